//! Doc comments that only repeat the name of their item.

use std::collections::BTreeSet;

use syn::{Attribute, Expr, ImplItem, Item, Lit, Meta, visit::Visit};

use crate::modules::Crate;

/// Words that add nothing to a name.
const FILLER: [&str; 16] = [
    "a", "an", "and", "are", "at", "for", "from", "in", "is", "it", "its", "of", "that", "the", "this", "to",
];

/// A line for each doc comment whose words are all in the name of its item.
pub(crate) fn findings(source: &Crate) -> Vec<String> {
    let mut lines = BTreeSet::new();
    for module in source.modules.values() {
        let mut docs = Docs::default();
        for item in &module.items {
            docs.visit_item(item);
        }
        for (name, doc) in docs.repeating {
            lines.insert(format!(
                "{}: the doc comment of {name} only repeats its name: {doc:?}",
                module.file.display()
            ));
        }
    }
    lines.into_iter().collect()
}

#[derive(Default)]
struct Docs {
    /// The name and the comment.
    repeating: Vec<(String, String)>,
}

impl Docs {
    fn check(&mut self, name: &impl ToString, attributes: &[Attribute]) {
        let (name, doc) = (name.to_string(), doc_of(attributes));
        if !doc.is_empty() && only_repeats(&name, &doc) {
            self.repeating.push((name, doc));
        }
    }
}

impl<'ast> Visit<'ast> for Docs {
    fn visit_item(&mut self, item: &'ast Item) {
        match item {
            Item::Const(item) => self.check(&item.ident, &item.attrs),
            Item::Enum(item) => self.check(&item.ident, &item.attrs),
            Item::Fn(item) => self.check(&item.sig.ident, &item.attrs),
            Item::Static(item) => self.check(&item.ident, &item.attrs),
            Item::Struct(item) => self.check(&item.ident, &item.attrs),
            Item::Trait(item) => self.check(&item.ident, &item.attrs),
            Item::Type(item) => self.check(&item.ident, &item.attrs),
            _ => {}
        }
        syn::visit::visit_item(self, item);
    }

    fn visit_field(&mut self, field: &'ast syn::Field) {
        if let Some(name) = &field.ident {
            self.check(name, &field.attrs);
        }
        syn::visit::visit_field(self, field);
    }

    fn visit_variant(&mut self, variant: &'ast syn::Variant) {
        self.check(&variant.ident, &variant.attrs);
        syn::visit::visit_variant(self, variant);
    }

    fn visit_impl_item(&mut self, item: &'ast ImplItem) {
        if let ImplItem::Fn(method) = item {
            self.check(&method.sig.ident, &method.attrs);
        }
        syn::visit::visit_impl_item(self, item);
    }
}

/// The text of an item's doc comment, its lines joined.
fn doc_of(attributes: &[Attribute]) -> String {
    let lines = attributes.iter().filter_map(|attribute| match &attribute.meta {
        Meta::NameValue(meta) if meta.path.is_ident("doc") => match &meta.value {
            Expr::Lit(literal) => match &literal.lit {
                Lit::Str(text) => Some(text.value().trim().to_owned()),
                _ => None,
            },
            _ => None,
        },
        _ => None,
    });
    lines.collect::<Vec<_>>().join(" ")
}

fn only_repeats(name: &str, doc: &str) -> bool {
    let name: BTreeSet<String> = words(&split_camel_case(name)).collect();
    words(doc)
        .filter(|word| !FILLER.contains(&word.as_str()))
        .all(|word| name.contains(&word))
}

/// The words in lower case, without a plural's or a verb's final `s`.
fn words(text: &str) -> impl Iterator<Item = String> {
    text.split(|character: char| !character.is_alphanumeric())
        .filter(|word| !word.is_empty())
        .map(|word| {
            let word = word.to_lowercase();
            word.strip_suffix('s').map_or(word.clone(), str::to_owned)
        })
}

fn split_camel_case(name: &str) -> String {
    let mut text = String::new();
    for character in name.chars() {
        if character.is_uppercase() {
            text.push('_');
        }
        text.push(character);
    }
    // A constant is in capitals throughout.
    if name.chars().any(char::is_lowercase) {
        text
    } else {
        name.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doc_that_adds_nothing_to_the_name_is_found() {
        for (name, doc, repeats) in [
            ("slot", "The slot.", true),
            ("exit_status", "Its exit status.", true),
            ("DiskSlots", "The disk slots.", true),
            ("MAX_FRAME", "Max frame.", true),
            ("slot", "The slot on the bus.", false),
            ("limit", "In bytes.", false),
            ("DiskSlots", "The slots for disks of a pod's containers.", false),
        ] {
            assert_eq!(only_repeats(name, doc), repeats, "{name}: {doc}");
        }
    }
}
