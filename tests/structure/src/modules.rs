//! The modules of a crate and the files that hold them.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use syn::{Attribute, Item, Meta};

/// A module's path within its crate, without the crate's name.
pub(crate) type ModulePath = Vec<String>;

/// Why a source cannot be checked.
#[derive(Debug)]
pub(crate) struct SourceError {
    path: PathBuf,
    reason: String,
}

impl SourceError {
    /// For a file that should exist.
    pub(crate) fn missing(path: PathBuf) -> Self {
        Self::new(&path, &io::Error::from(io::ErrorKind::NotFound))
    }

    /// For `path`, with the reason.
    pub(crate) fn new(path: &Path, reason: &impl ToString) -> Self {
        Self {
            path: path.to_owned(),
            reason: reason.to_string(),
        }
    }
}

impl std::fmt::Display for SourceError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}: {}", self.path.display(), self.reason)
    }
}

/// A module: a whole file or a part of one.
#[derive(Debug)]
pub(crate) struct Module {
    /// The file, relative to the top of the tree.
    pub(crate) file: PathBuf,
    /// Its items, without child modules, which have entries of their own, and without unit tests.
    pub(crate) items: Vec<Item>,
}

/// All modules of a crate, unit tests excepted.
#[derive(Debug, Default)]
pub(crate) struct Crate {
    /// By path; the root's is empty.
    pub(crate) modules: BTreeMap<ModulePath, Module>,
}

impl Crate {
    /// Reads the crate whose root is `root`, a path relative to `top`.
    pub(crate) fn load(top: &Path, root: &Path) -> Result<Self, SourceError> {
        let mut source = Self::default();
        let folder = root.parent().unwrap_or(Path::new("")).to_owned();
        source.load_file(top, root.to_owned(), folder, ModulePath::new())?;
        Ok(source)
    }

    /// `folder` is where the files of the module's children lie.
    fn load_file(&mut self, top: &Path, file: PathBuf, folder: PathBuf, path: ModulePath) -> Result<(), SourceError> {
        let text = fs::read_to_string(top.join(&file)).map_err(|error| SourceError::new(&file, &error))?;
        let parsed = syn::parse_file(&text).map_err(|error| SourceError::new(&file, &error))?;
        self.add(top, file, folder, path, parsed.items)
    }

    fn add(
        &mut self,
        top: &Path,
        file: PathBuf,
        folder: PathBuf,
        path: ModulePath,
        items: Vec<Item>,
    ) -> Result<(), SourceError> {
        let mut kept = Vec::new();
        for item in items {
            match item {
                Item::Mod(module) if is_test(&module.attrs) => {}
                Item::Mod(module) => {
                    let name = module.ident.to_string();
                    let child = path.iter().cloned().chain([name.clone()]).collect();
                    let inner = folder.join(&name);
                    match module.content {
                        Some((_, items)) => self.add(top, file.clone(), inner, child, items)?,
                        None => {
                            let flat = folder.join(format!("{name}.rs"));
                            let nested = inner.join("mod.rs");
                            let found = if top.join(&flat).exists() { flat } else { nested };
                            self.load_file(top, found, inner, child)?;
                        }
                    }
                }
                item if is_test(attributes(&item)) => {}
                item => kept.push(item),
            }
        }
        self.modules.insert(path, Module { file, items: kept });
        Ok(())
    }
}

/// Whether an item exists only in unit tests and in fuzz targets: `#[cfg(test)]`, `#[cfg(any(test, fuzzing))]` or
/// `#[test]`.
fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| match &attribute.meta {
        Meta::List(list) if list.path.is_ident("cfg") => {
            matches!(list.tokens.to_string().as_str(), "test" | "any (test , fuzzing)")
        }
        meta => meta.path().is_ident("test"),
    })
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}
