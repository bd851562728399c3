//! Doc comments that only repeat the name of their item, or of the type that the item belongs to.

use std::collections::BTreeSet;

use syn::{Attribute, Expr, ImplItem, Item, ItemImpl, Lit, Meta, TraitItem, Type, Variant, visit::Visit};

use crate::modules::Crate;

/// Words that add nothing to a name, without a final `s`.
const FILLER: [&str; 24] = [
    "a", "an", "and", "are", "at", "call", "for", "from", "i", "in", "it", "name", "number", "of", "one", "return",
    "that", "the", "these", "thi", "to", "value", "whether", "which",
];

/// A line for each doc comment whose words are all in the name of its item, or of its type.
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
    /// The names of the type, and of the variant, whose parts are being visited.
    parents: Vec<String>,
    /// The name and the comment.
    repeating: Vec<(String, String)>,
}

impl Docs {
    fn check(&mut self, name: &impl ToString, attributes: &[Attribute]) {
        let (name, doc) = (name.to_string(), doc_of(attributes));
        if !doc.is_empty() && only_repeats(&name, &self.parents, &doc) {
            self.repeating.push((name, doc));
        }
    }

    /// Visits the parts of `parent`.
    fn inside(&mut self, parent: String, visit: impl FnOnce(&mut Self)) {
        self.parents.push(parent);
        visit(self);
        self.parents.pop();
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
        match item {
            Item::Enum(syn::ItemEnum { ident, .. })
            | Item::Struct(syn::ItemStruct { ident, .. })
            | Item::Trait(syn::ItemTrait { ident, .. }) => {
                self.inside(ident.to_string(), |docs| syn::visit::visit_item(docs, item));
            }
            _ => syn::visit::visit_item(self, item),
        }
    }

    fn visit_item_impl(&mut self, item: &'ast ItemImpl) {
        self.inside(type_name(&item.self_ty), |docs| syn::visit::visit_item_impl(docs, item));
    }

    fn visit_field(&mut self, field: &'ast syn::Field) {
        if let Some(name) = &field.ident {
            self.check(name, &field.attrs);
        }
        syn::visit::visit_field(self, field);
    }

    fn visit_variant(&mut self, variant: &'ast Variant) {
        self.check(&variant.ident, &variant.attrs);
        self.inside(variant.ident.to_string(), |docs| {
            syn::visit::visit_variant(docs, variant)
        });
    }

    fn visit_trait_item(&mut self, item: &'ast TraitItem) {
        match item {
            TraitItem::Const(item) => self.check(&item.ident, &item.attrs),
            TraitItem::Fn(method) => self.check(&method.sig.ident, &method.attrs),
            TraitItem::Type(item) => self.check(&item.ident, &item.attrs),
            _ => {}
        }
        syn::visit::visit_trait_item(self, item);
    }

    fn visit_impl_item(&mut self, item: &'ast ImplItem) {
        if let ImplItem::Fn(method) = item {
            self.check(&method.sig.ident, &method.attrs);
        }
        syn::visit::visit_impl_item(self, item);
    }
}

/// The name of the type of an `impl`, without its path and parameters.
fn type_name(implemented: &Type) -> String {
    match implemented {
        Type::Path(path) => path
            .path
            .segments
            .last()
            .map_or_else(String::new, |segment| segment.ident.to_string()),
        _ => String::new(),
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

fn only_repeats(name: &str, parents: &[String], doc: &str) -> bool {
    let names = parents.iter().map(String::as_str).chain([name]);
    let names: BTreeSet<String> = names
        .flat_map(|name| words(&split_camel_case(name)).collect::<Vec<_>>())
        .collect();
    // The exact name of a file or field adds something.
    let is_reference = doc.starts_with('`');
    !is_reference
        && words(doc)
            .filter(|word| !FILLER.contains(&word.as_str()))
            .all(|word| names.contains(&word))
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
        for (parent, name, doc, repeats) in [
            ("", "slot", "The slot.", true),
            ("", "exit_status", "Its exit status.", true),
            ("", "DiskSlots", "The disk slots.", true),
            ("", "MAX_FRAME", "Max frame.", true),
            ("Compression", "name", "The name of the compression.", true),
            ("NetworkParameter", "value", "The value.", true),
            ("Lifecycle", "phase", "Returns the phase.", true),
            ("Stats", "cpu", "`cpu.stat`.", false),
            ("", "slot", "The slot on the bus.", false),
            ("", "limit", "In bytes.", false),
            ("", "DiskSlots", "The slots for disks of a pod's containers.", false),
            ("CreateContainer", "container", "The id of the container.", false),
        ] {
            assert_eq!(only_repeats(name, &[parent.to_owned()], doc), repeats, "{name}: {doc}");
        }
    }
}
