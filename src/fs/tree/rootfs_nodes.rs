//! The nodes of root file systems, as this process knows them. The class in a node id ([`super::node_id`]) is not
//! sufficient where a decision protects the host: the guest chooses the ids in its requests.

use std::{
    collections::{HashMap, hash_map},
    ffi::CStr,
};

use parking_lot::Mutex;
use virtiofsd::filesystem::ROOT_ID;

use crate::fs::node_id::ROOTFS;

/// Nodes of root file systems that the guest has looked up, by virtiofsd's ids. Nodes of volumes are not stored.
#[derive(Debug, Default)]
pub(super) struct RootfsNodes {
    nodes: Mutex<HashMap<u64, Node>>,
}

#[derive(Debug)]
struct Node {
    place: Place,
    /// How often the guest has looked it up and not forgotten it (FUSE, `nlookup`).
    lookups: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// A directory `<container id>` of the tree.
    Container,
    /// A root file system, or a file in one.
    Rootfs,
}

impl RootfsNodes {
    /// Counts a look-up of `node` as `name` in the directory `parent`.
    pub(super) fn add(&self, parent: u64, name: &CStr, node: u64) {
        let mut nodes = self.nodes.lock();
        let place = match nodes.get(&parent).map(|parent| parent.place) {
            _ if parent == ROOT_ID => Place::Container,
            Some(Place::Container) if name == ROOTFS => Place::Rootfs,
            Some(Place::Rootfs) => Place::Rootfs,
            Some(Place::Container) | None => return,
        };
        let known = nodes.entry(node).or_insert(Node { place, lookups: 0 });
        known.lookups = known.lookups.saturating_add(1);
    }

    /// Takes back `count` look-ups of `node`.
    pub(super) fn forget(&self, node: u64, count: u64) {
        if let hash_map::Entry::Occupied(mut known) = self.nodes.lock().entry(node) {
            let left = known.get().lookups.saturating_sub(count);
            if left == 0 {
                known.remove();
            } else {
                known.get_mut().lookups = left;
            }
        }
    }

    /// Forgets all nodes.
    pub(super) fn clear(&self) {
        self.nodes.lock().clear();
    }

    /// Whether `node` is in a container's root file system.
    pub(super) fn contains(&self, node: u64) -> bool {
        self.nodes
            .lock()
            .get(&node)
            .is_some_and(|node| node.place == Place::Rootfs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_nodes_looked_up_below_a_rootfs_are_in_it_until_they_are_forgotten() {
        let nodes = RootfsNodes::default();
        for (parent, name, node) in [
            (ROOT_ID, c"c1", 2),
            (2, c"rootfs", 3),
            (3, c"etc", 4),
            (2, c"0", 5),
            (5, c"rootfs", 6),
            // A parent that was not looked up before.
            (77, c"rootfs", 7),
        ] {
            nodes.add(parent, name, node);
        }
        let inside = |nodes: &RootfsNodes| (1..=7).filter(|node| nodes.contains(*node)).collect::<Vec<_>>();
        assert_eq!(inside(&nodes), [3, 4]);

        nodes.add(3, c"etc", 4);
        nodes.forget(4, 1);
        assert_eq!(inside(&nodes), [3, 4], "looked up twice");
        nodes.forget(4, 1);
        nodes.forget(3, u64::MAX);
        assert_eq!(inside(&nodes), [0; 0]);
    }
}
