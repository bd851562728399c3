//! The hot-plugged disks of a pod's containers.

use std::{collections::HashMap, time::Duration};

use nutshell_protocol::Request;
use parking_lot::{Mutex, MutexGuard};

use super::{
    error::PodError,
    root_disk::{self, DiskContents},
};
use crate::{
    oci::{ContainerId, RootDisk},
    shim::machine::Machine,
};

/// The time limit for guest and vmm to release a disk that no container uses any more.
const DISK_RELEASE_TIMEOUT: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });

/// The disk slots of a machine. A container uses at most one.
#[derive(Debug)]
pub(super) struct DiskSlots {
    count: u32,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    free: Vec<u32>,
    taken: HashMap<ContainerId, u32>,
}

impl DiskSlots {
    /// `count` free slots, numbered from 0.
    pub(super) fn new(count: u32) -> Self {
        Self {
            count,
            inner: Mutex::new(Inner {
                free: (0..count).rev().collect(),
                taken: HashMap::new(),
            }),
        }
    }

    /// Opens the disk of the container `id` and puts it into a free slot. Returns the slot's number and what is on the
    /// disk. Call [`Self::unplug`] even if this fails: the container may already hold a slot.
    pub(super) async fn plug(
        &self,
        machine: &Machine,
        id: &ContainerId,
        root: RootDisk,
    ) -> Result<(u32, DiskContents), PodError> {
        let (disk, contents) = root_disk::open(root).await?;
        let slot = {
            let mut inner = self.lock();
            let slot = inner.free.pop().ok_or(PodError::NoSlot { max: self.count })?;
            inner.taken.insert(id.clone(), slot);
            slot
        };
        let plugged = machine.plug_disk(slot, &disk).await;
        plugged.map_err(|error| PodError::Disk {
            path: disk.path().to_owned(),
            source: error,
        })?;
        Ok((slot, contents))
    }

    /// Takes the disk of the container `id` out of the machine, if it has one.
    pub(super) async fn unplug(&self, machine: &Machine, id: &ContainerId) {
        let Some(slot) = self.lock().taken.remove(id) else {
            return;
        };
        let release = async {
            let released = machine.agent().run(Request::ReleaseDisk { slot }).await;
            released.map_err(|error| error.to_string())?;
            let unplugged = machine.unplug_disk(slot).await;
            unplugged.map_err(|error| error.to_string())
        };
        let released = tokio::time::timeout(DISK_RELEASE_TIMEOUT, release).await;
        match released.unwrap_or_else(|_| Err(format!("not done within {} s", DISK_RELEASE_TIMEOUT.as_secs()))) {
            Ok(()) => self.lock().free.push(slot),
            // The slot is never used again: a driver that is still bound to the old disk would not notice a new one.
            Err(error) => {
                log::warn!("cannot remove the disk of {id} from the virtual machine; its slot is lost: {error}");
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock()
    }
}
