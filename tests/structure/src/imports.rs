//! The imports between modules: from `use` declarations and from paths in the code, followed through re-exports to the
//! module that defines the name.

use std::collections::{BTreeMap, BTreeSet};

use proc_macro2::{TokenStream, TokenTree};
use syn::{Item, UseTree, Visibility, visit::Visit};

use crate::modules::{Crate, ModulePath};

/// An import: the module that uses, the module that defines, and the name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Import {
    /// The module that uses the name.
    pub(crate) from: ModulePath,
    /// The module that defines it.
    pub(crate) to: ModulePath,
    /// The name, for the report.
    pub(crate) name: String,
}

/// All imports of a crate between different modules. A re-export does not count: each use of the name is an import from
/// the module that defines it.
pub(crate) fn find_imports(source: &Crate) -> BTreeSet<Import> {
    let exports = exports(source);
    let mut imports = BTreeSet::new();
    for (path, module) in &source.modules {
        let mut paths = Paths::default();
        for item in &module.items {
            match item {
                Item::Use(item) if !matches!(item.vis, Visibility::Inherited) => {}
                item => paths.visit_item(item),
            }
        }
        for used in paths.found {
            if let Some(resolved) = resolve(source, &exports, path, &used)
                && resolved.module != *path
            {
                imports.insert(Import {
                    from: path.clone(),
                    to: resolved.module,
                    name: resolved.name,
                });
            }
        }
    }
    imports
}

/// For each module, the names that it re-exports, and the path that each stands for.
type Exports = BTreeMap<ModulePath, BTreeMap<String, Vec<String>>>;

fn exports(source: &Crate) -> Exports {
    let mut exports = Exports::new();
    for (path, module) in &source.modules {
        let names = exports.entry(path.clone()).or_default();
        for item in &module.items {
            if let Item::Use(item) = item {
                // Private imports are visible to the module's children as well.
                flatten(&item.tree, &mut Vec::new(), &mut |target, name| {
                    names.insert(name, target);
                });
            }
        }
    }
    exports
}

fn flatten(tree: &UseTree, prefix: &mut Vec<String>, found: &mut impl FnMut(Vec<String>, String)) {
    match tree {
        UseTree::Path(path) => {
            prefix.push(path.ident.to_string());
            flatten(&path.tree, prefix, found);
            prefix.pop();
        }
        UseTree::Name(name) if name.ident == "self" => {
            found(prefix.clone(), prefix.last().cloned().unwrap_or_default());
        }
        UseTree::Name(name) => {
            let target = prefix.iter().cloned().chain([name.ident.to_string()]).collect();
            found(target, name.ident.to_string());
        }
        UseTree::Rename(name) => {
            let target = prefix.iter().cloned().chain([name.ident.to_string()]).collect();
            found(target, name.rename.to_string());
        }
        UseTree::Glob(_) => found(prefix.clone(), "*".to_owned()),
        UseTree::Group(group) => group.items.iter().for_each(|tree| flatten(tree, prefix, found)),
    }
}

struct Resolved {
    module: ModulePath,
    name: String,
}

/// Resolves the path `used` in module `from`. `None` if it leads out of this crate.
fn resolve(source: &Crate, exports: &Exports, from: &ModulePath, used: &[String]) -> Option<Resolved> {
    const MAX_REEXPORTS: usize = 16;
    let (mut module, mut rest) = (from.clone(), used.to_vec());
    for _ in 0..MAX_REEXPORTS {
        match rest.first()?.as_str() {
            "crate" => {
                module.clear();
                rest.remove(0);
            }
            "self" => drop(rest.remove(0)),
            "super" => {}
            // An absolute path names another crate, unless it starts with a child or an imported name.
            first => {
                let child: ModulePath = module.iter().cloned().chain([first.to_owned()]).collect();
                if !source.modules.contains_key(&child) && !exports.get(&module)?.contains_key(first) {
                    return None;
                }
            }
        }
        while rest.first().is_some_and(|segment| segment == "super") {
            module.pop()?;
            rest.remove(0);
        }
        while let Some(first) = rest.first() {
            let child: ModulePath = module.iter().cloned().chain([first.clone()]).collect();
            if !source.modules.contains_key(&child) {
                break;
            }
            module = child;
            rest.remove(0);
        }
        let Some(name) = rest.first().cloned() else {
            let name = module.last().cloned().unwrap_or_else(|| "crate".to_owned());
            return Some(Resolved { module, name });
        };
        match exports.get(&module).and_then(|names| names.get(&name)) {
            Some(target) => {
                let mut target = target.clone();
                target.extend(rest.drain(1..));
                // A re-exported item of another crate is not an import from the module that re-exports it.
                if !leads_inside(source, exports, &module, &target) {
                    return None;
                }
                rest = target;
            }
            None => return Some(Resolved { module, name }),
        }
    }
    None
}

fn leads_inside(source: &Crate, exports: &Exports, module: &ModulePath, path: &[String]) -> bool {
    match path.first().map(String::as_str) {
        Some("crate" | "self" | "super") => true,
        Some(first) => {
            let child: ModulePath = module.iter().cloned().chain([first.to_owned()]).collect();
            let own = exports.get(module).and_then(|names| names.get(first));
            source.modules.contains_key(&child) || own.is_some_and(|target| target.as_slice() != path)
        }
        None => false,
    }
}

/// Collects paths that may lead to other modules.
#[derive(Default)]
struct Paths {
    found: BTreeSet<Vec<String>>,
}

impl<'ast> Visit<'ast> for Paths {
    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        flatten(&item.tree, &mut Vec::new(), &mut |target, _| {
            self.found.insert(target);
        });
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let segments: Vec<_> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        if segments.len() > 1 && path.leading_colon.is_none() {
            self.found.insert(segments);
        }
        syn::visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        self.visit_tokens(call.tokens.clone());
        syn::visit::visit_macro(self, call);
    }

    fn visit_visibility(&mut self, _: &'ast Visibility) {}
}

impl Paths {
    /// Paths in the arguments of a macro: names joined by `::`.
    fn visit_tokens(&mut self, tokens: TokenStream) {
        let mut path: Vec<String> = Vec::new();
        let mut colons = 0;
        for token in tokens {
            match token {
                TokenTree::Ident(name) if colons == 2 => {
                    path.push(name.to_string());
                    colons = 0;
                    continue;
                }
                TokenTree::Punct(mark) if mark.as_char() == ':' && !path.is_empty() => {
                    colons += 1;
                    continue;
                }
                TokenTree::Ident(name) => {
                    self.keep(&mut path);
                    path.push(name.to_string());
                }
                TokenTree::Group(group) => {
                    self.keep(&mut path);
                    self.visit_tokens(group.stream());
                }
                _ => self.keep(&mut path),
            }
            colons = 0;
        }
        self.keep(&mut path);
    }

    fn keep(&mut self, path: &mut Vec<String>) {
        let path = std::mem::take(path);
        if path.len() > 1 {
            self.found.insert(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    /// The imports of a crate made of these files, as `from -> to name`.
    fn imports_of(files: &[(&str, &str)]) -> Vec<String> {
        let folder = std::env::temp_dir().join(format!("structure-{}-{}", std::process::id(), files[0].1.len()));
        for (path, text) in files {
            let path = folder.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let source = Crate::load(&folder, Path::new("main.rs"));
        fs::remove_dir_all(&folder).unwrap();
        find_imports(&source.unwrap())
            .iter()
            .map(|import| format!("{} -> {} {}", import.from.join("::"), import.to.join("::"), import.name))
            .collect()
    }

    #[test]
    fn name_is_followed_through_a_reexport_to_the_module_that_defines_it() {
        let files = [
            ("main.rs", "mod a; mod b;"),
            ("a/mod.rs", "mod inner; pub(crate) use self::inner::Thing;"),
            ("a/inner.rs", "pub(crate) struct Thing;"),
            ("b.rs", "use crate::a::Thing; fn f(_: Thing) {}"),
        ];
        assert_eq!(imports_of(&files), ["b -> a::inner Thing"]);
    }

    #[test]
    fn imports_include_paths_in_code_and_macros_but_not_other_crates_or_unit_tests() {
        let files = [
            ("main.rs", "mod a; mod b; fn main() { println!(\"{}\", b::value()); }"),
            (
                "a.rs",
                "use std::fs; fn f() { super::b::value(); fs::read(\"x\"); } #[cfg(test)] mod tests { use crate::b; }",
            ),
            ("b.rs", "pub(crate) fn value() -> u8 { 1 } #[cfg(test)] use crate::a;"),
        ];
        assert_eq!(imports_of(&files), [" -> b value", "a -> b value"]);
    }
}
