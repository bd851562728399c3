//! Finds the sockets of running shims, by the files that `start` and the shim have left in their bundles.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// The folders of bundles in containerd's state directory: of tasks, and of sandboxes of the Sandbox service. In both,
/// a bundle is NAMESPACE/ID.
const BUNDLES: [&str; 2] = [
    "io.containerd.runtime.v2.task",
    "io.containerd.sandbox.controller.v1.shim",
];

/// A file that nutshell's shim writes into the bundle that it was started for, and runc's shim does not write.
const OWN_FILE: &str = "shim.pid";

/// The file with the address of a bundle's shim.
const ADDRESS_FILE: &str = "address";

/// The sockets of nutshell's shims below `state`, in order.
pub(super) fn find_sockets(state: &Path) -> BTreeSet<PathBuf> {
    let bundles = BUNDLES
        .iter()
        .flat_map(|folder| folders(&state.join(folder)))
        .flat_map(|namespace| folders(&namespace));
    bundles
        .filter(|bundle| bundle.join(OWN_FILE).exists())
        .filter_map(|bundle| {
            let address = fs::read_to_string(bundle.join(ADDRESS_FILE)).ok()?;
            let socket = address.trim().strip_prefix("unix://")?;
            Some(PathBuf::from(socket))
        })
        .collect()
}

/// The entries of a folder, none if it does not exist.
fn folders(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten();
    entries.filter_map(|entry| Some(entry.ok()?.path())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_of_this_shim_are_found_once_each() {
        let state = tempfile::tempdir().unwrap();
        let bundle = |path: &str, files: &[(&str, &str)]| {
            let bundle = state.path().join(path);
            fs::create_dir_all(&bundle).unwrap();
            for (name, content) in files {
                fs::write(bundle.join(name), content).unwrap();
            }
        };
        let own = |address| [("address", address), ("shim.pid", "1")];
        bundle("io.containerd.runtime.v2.task/default/a", &own("unix:///run/s/1"));
        bundle("io.containerd.runtime.v2.task/k8s.io/b", &own("unix:///run/s/2\n"));
        bundle(
            "io.containerd.sandbox.controller.v1.shim/k8s.io/c",
            &own("unix:///run/s/2"),
        );
        // Another shim's bundle, and one without an address.
        bundle(
            "io.containerd.runtime.v2.task/default/runc",
            &[("address", "unix:///run/s/3")],
        );
        bundle("io.containerd.runtime.v2.task/default/new", &[("shim.pid", "1")]);

        let found = find_sockets(state.path());

        assert_eq!(found, BTreeSet::from(["/run/s/1".into(), "/run/s/2".into()]));
        assert!(find_sockets(Path::new("/no/such/directory")).is_empty());
    }
}
