//! Sizes of files and folders, and the documentation at the top of each `mod.rs`.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use crate::modules::SourceError;

/// Maximum number of lines of a source file.
pub(crate) const MAX_LINES: usize = 600;

/// Maximum number of source files in a folder.
pub(crate) const MAX_FILES: usize = 13;

/// The folders that hold sources.
const FOLDERS: [&str; 6] = ["benches", "disk-image", "guest", "linux", "src", "tests"];

/// A line for each file or folder that is too large, and for each `mod.rs` without documentation.
pub(crate) fn findings(top: &Path) -> Result<Vec<String>, SourceError> {
    let mut sources = Vec::new();
    for folder in FOLDERS {
        collect(&top.join(folder), &mut sources)?;
    }
    let mut lines = Vec::new();
    let mut folders = BTreeMap::<&Path, usize>::new();
    for path in &sources {
        let text = fs::read_to_string(path).map_err(|error| SourceError::new(path, &error))?;
        let shown = path.strip_prefix(top).unwrap_or(path).display();
        let count = text.lines().count();
        if count > MAX_LINES {
            lines.push(format!("{shown} has {count} lines: more than {MAX_LINES}"));
        }
        if path.ends_with("mod.rs") && !text.starts_with("//!") {
            lines.push(format!(
                "{shown} does not start with a `//!` comment that documents the module"
            ));
        }
        if let Some(folder) = path.parent() {
            *folders.entry(folder).or_default() += 1;
        }
    }
    for (folder, count) in folders {
        if count > MAX_FILES {
            let shown = folder.strip_prefix(top).unwrap_or(folder).display();
            lines.push(format!("{shown} has {count} source files: more than {MAX_FILES}"));
        }
    }
    Ok(lines)
}

/// All Rust sources below `folder`, which need not exist.
fn collect(folder: &Path, sources: &mut Vec<PathBuf>) -> Result<(), SourceError> {
    if !folder.exists() {
        return Ok(());
    }
    let failed = |error: std::io::Error| SourceError::new(folder, &error);
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let path = entry.path();
        if entry.file_type().map_err(failed)?.is_dir() {
            collect(&path, sources)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            sources.push(path);
        }
    }
    Ok(())
}
