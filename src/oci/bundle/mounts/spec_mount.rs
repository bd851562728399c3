//! Reads and rewrites one mount of a spec.

use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::Mount;

use crate::oci::plan::ReadOnly;

/// The mount's name in errors.
pub(in crate::oci::bundle) fn field_name(mount: &Mount) -> String {
    format!("mount {}", mount.destination().display())
}

pub(in crate::oci::bundle) fn options(mount: &Mount) -> impl Iterator<Item = &str> {
    mount.options().iter().flatten().map(String::as_str)
}

pub(in crate::oci::bundle) fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind") || options(mount).any(|option| matches!(option, "bind" | "rbind"))
}

/// The last of contradicting options wins, as with mount(8).
pub(in crate::oci::bundle) fn read_only(mount: &Mount) -> ReadOnly {
    options(mount).fold(ReadOnly::None, |before, option| match (option, before) {
        ("rw", _) => ReadOnly::None,
        ("rro", _) | ("ro", ReadOnly::All) => ReadOnly::All,
        ("ro", _) => ReadOnly::Top,
        _ => before,
    })
}

/// Removes the options that make the mount read-only.
pub(super) fn remove_read_only(mount: &mut Mount) {
    let mut options = mount.options().clone().unwrap_or_default();
    options.retain(|option| !matches!(option.as_str(), "ro" | "rro"));
    mount.set_options(Some(options));
}

pub(super) fn add_option(mount: &mut Mount, option: &str) {
    let mut options = mount.options().clone().unwrap_or_default();
    options.push(option.to_owned());
    mount.set_options(Some(options));
}

/// Turns `mount` into a bind mount of `source`, and keeps its options.
pub(super) fn set_bind(mount: &mut Mount, source: PathBuf) {
    if !options(mount).any(|option| matches!(option, "bind" | "rbind")) {
        add_option(mount, "bind");
    }
    mount.set_typ(Some("bind".to_owned()));
    mount.set_source(Some(source));
}

/// Turns `mount` into a file system of type `kind` that needs no source.
pub(super) fn set_filesystem(mount: &mut Mount, kind: &str, options: &[&str]) {
    mount.set_typ(Some(kind.to_owned()));
    mount.set_source(Some(kind.into()));
    set_options(mount, options);
}

pub(super) fn set_options(mount: &mut Mount, options: &[&str]) {
    mount.set_options(Some(options.iter().map(|option| (*option).to_owned()).collect()));
}

/// Makes a path absolute and resolves `.` and `..`, without access to the file system. The result can be compared by
/// prefix.
pub(super) fn normalize(path: &Path) -> PathBuf {
    let mut normalized = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::ParentDir => {
                normalized.pop();
            }
            Component::Normal(name) => normalized.push(name),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    normalized
}
