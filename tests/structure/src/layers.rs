//! The layers of the executable: imports point from a higher layer to a lower one (ARCHITECTURE.md).

use std::collections::BTreeSet;

use crate::{imports::Import, modules::Crate};

/// From the top down. Modules of one layer do not import each other.
pub(crate) const LAYERS: [&[&str]; 16] = [
    &[""],
    &["admin", "check", "shim::entry"],
    &["disk"],
    &["shim::api"],
    &["shim::tasks"],
    &["shim::vm"],
    &["shim::pod"],
    &["shim::network", "shim::share", "shim::stdio"],
    &["shim::machine"],
    &["shim"],
    &["guest_image"],
    &["vmm"],
    &["devices", "fs", "oci"],
    &["control"],
    &["memory"],
    &["jail"],
];

/// A line for each import that does not point downwards, and for each module that has no layer.
pub(crate) fn findings(source: &Crate, imports: &BTreeSet<Import>) -> Vec<String> {
    let mut lines = Vec::new();
    for path in source.modules.keys() {
        if layer(path).is_none() {
            lines.push(format!("{} has no layer: add it to tests/structure", path.join("::")));
        }
    }
    for import in imports {
        let (Some(from), Some(to)) = (layer(&import.from), layer(&import.to)) else {
            continue;
        };
        // A module may import from its descendants, to re-export their items.
        let is_descendant = import.to.starts_with(&import.from);
        if from.1 != to.1 && from.0 >= to.0 && !is_descendant {
            lines.push(format!(
                "{} imports {} from {}, which is not below it",
                import.from.join("::"),
                import.name,
                import.to.join("::")
            ));
        }
    }
    lines
}

/// The number of a module's layer, counted from the top, and the module that has it.
fn layer(path: &[String]) -> Option<(usize, String)> {
    (0..=path.len()).rev().find_map(|length| {
        let name = path[..length].join("::");
        // Only the root itself is in the root's layer.
        (length > 0 || path.is_empty()).then_some(())?;
        let number = LAYERS.iter().position(|names| names.contains(&name.as_str()))?;
        Some((number, name))
    })
}
