//! virtio-fs (virtio 1.3 §5.11): the frontend of the device. The fs process serves the queues over the vhost-user
//! protocol: it maps guest memory, and KVM connects its kicks and interrupts directly to the guest. After activation,
//! this process does not take part in requests.

use std::{os::unix::net::UnixStream, sync::Arc};

use vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_user::{Frontend, VhostUserFrontend, message::VhostUserProtocolFeatures, message::VhostUserVirtioFeatures},
};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_queue::QueueT;
use vm_memory::GuestMemoryBackend;

use super::device::{ActivateError, Activation, Device, copy_config};
use crate::{devices::counters::Counters, memory::MemoryRegions};

/// High-priority and request queue. The size of the request queue limits the size of a request.
const QUEUE_SIZES: [u16; 2] = [64, 512];

/// The length of the tag in the configuration (virtio 1.3 §5.11.4).
const TAG_LENGTH: usize = 36;

pub(crate) struct Fs {
    socket: Option<UnixStream>,
    frontend: Option<Frontend>,
    counters: Arc<Counters>,
    config: [u8; TAG_LENGTH + 4],
}

impl Fs {
    /// A file system with tag `tag`, which the backend at the other end of `socket` serves.
    pub(crate) fn new(tag: &str, socket: UnixStream) -> Self {
        let mut config = [0; TAG_LENGTH + 4];
        let length = tag.len().min(TAG_LENGTH);
        config[..length].copy_from_slice(&tag.as_bytes()[..length]);
        config[TAG_LENGTH..].copy_from_slice(&1_u32.to_le_bytes());
        Self {
            socket: Some(socket),
            frontend: None,
            counters: Counters::new("fs"),
            config,
        }
    }

    /// Makes the file server map all of `memory`. Once this returns, the guest may use new regions.
    ///
    /// # Errors
    ///
    /// The text names the vhost-user message that failed.
    pub(crate) fn grow(&self, memory: &MemoryRegions) -> Result<(), String> {
        // Before activation there is nothing to update: activation will send the regions of that time.
        let Some(frontend) = &self.frontend else {
            return Ok(());
        };
        frontend
            .set_mem_table(&vhost_regions(memory)?)
            .map_err(|error| format!("SET_MEM_TABLE: {error}"))?;
        // Wait for a reply. The server handles messages in order, so it has mapped the memory by then.
        frontend
            .get_features()
            .map(drop)
            .map_err(|error| format!("GET_FEATURES: {error}"))
    }

    /// Sends the set-up messages of the vhost-user protocol, in the required order.
    fn set_up_backend(&self, frontend: &mut Frontend, activation: &Activation) -> Result<(), String> {
        let step = |message: &'static str| move |error: vhost::Error| format!("{message}: {error}");
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        frontend.set_owner().map_err(step("SET_OWNER"))?;
        let offered = frontend.get_features().map_err(step("GET_FEATURES"))?;
        if activation.features & !offered != 0 || offered & protocol == 0 {
            return Err("the file server lacks a feature that the driver accepted".to_owned());
        }
        frontend
            .set_features(activation.features | protocol)
            .map_err(step("SET_FEATURES"))?;
        let understood = frontend
            .get_protocol_features()
            .map_err(step("GET_PROTOCOL_FEATURES"))?;
        frontend
            .set_protocol_features(understood & VhostUserProtocolFeatures::MQ)
            .map_err(step("SET_PROTOCOL_FEATURES"))?;
        let regions = vhost_regions(activation.memory.regions())?;
        frontend.set_mem_table(&regions).map_err(step("SET_MEM_TABLE"))?;
        for (queue_index, queue) in (0_u16..).zip(&activation.queues) {
            let index = usize::from(queue_index);
            let interrupt = activation.interrupt.delegate(queue_index);
            let interrupt = interrupt.map_err(|error| format!("duplicate the eventfd of an interrupt: {error}"))?;
            let configuration = queue.configuration();
            let config = VringConfigData {
                queue_max_size: configuration.max_size(),
                queue_size: configuration.size(),
                flags: 0,
                desc_table_addr: ring_address(&regions, configuration.desc_table())?,
                used_ring_addr: ring_address(&regions, configuration.used_ring())?,
                avail_ring_addr: ring_address(&regions, configuration.avail_ring())?,
                log_addr: None,
            };
            frontend
                .set_vring_num(index, configuration.size())
                .map_err(step("SET_VRING_NUM"))?;
            frontend
                .set_vring_addr(index, &config)
                .map_err(step("SET_VRING_ADDR"))?;
            frontend.set_vring_base(index, 0).map_err(step("SET_VRING_BASE"))?;
            frontend
                .set_vring_call(index, &interrupt)
                .map_err(step("SET_VRING_CALL"))?;
            frontend
                .set_vring_kick(index, queue.kick())
                .map_err(step("SET_VRING_KICK"))?;
            frontend
                .set_vring_enable(index, true)
                .map_err(step("SET_VRING_ENABLE"))?;
        }
        Ok(())
    }
}

/// The regions of guest memory, with contiguous ones merged, since the protocol allows at most 32. Memory that grew in
/// steps is contiguous in the file behind it.
fn vhost_regions(memory: &MemoryRegions) -> Result<Vec<VhostUserMemoryRegionInfo>, String> {
    let mut regions: Vec<VhostUserMemoryRegionInfo> = Vec::new();
    for region in memory.iter() {
        let next = VhostUserMemoryRegionInfo::from_guest_region(region);
        let next = next.map_err(|error| format!("cannot share a region of guest memory: {error}"))?;
        match regions.last_mut() {
            Some(last)
                if last.guest_phys_addr + last.memory_size == next.guest_phys_addr
                    && last.mmap_offset + last.memory_size == next.mmap_offset =>
            {
                last.memory_size += next.memory_size;
            }
            _ => regions.push(next),
        }
    }
    Ok(regions)
}

/// Translates guest address `address` to the address in this process by which the protocol refers to it.
fn ring_address(regions: &[VhostUserMemoryRegionInfo], address: u64) -> Result<u64, String> {
    let host_address = regions.iter().find_map(|region| {
        let offset = address.checked_sub(region.guest_phys_addr)?;
        (offset < region.memory_size).then_some(region.userspace_addr + offset)
    });
    host_address.ok_or_else(|| format!("the ring at {address:#x} is not in guest memory"))
}

impl Device for Fs {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let socket = self
            .socket
            .take()
            .ok_or_else(|| ActivateError::Backend("the file server supports one activation only".to_owned()))?;
        let mut frontend = Frontend::from_stream(socket, QUEUE_SIZES.len() as u64);
        self.set_up_backend(&mut frontend, &activation)
            .map_err(ActivateError::Backend)?;
        self.frontend = Some(frontend);
        Ok(())
    }

    fn reset(&mut self) {
        // The file server exits when its connection closes. A second activation is not supported and not needed: the
        // agent mounts the share once.
        self.frontend = None;
    }
}

impl std::fmt::Debug for Fs {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Fs").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{add_region, allocate};

    const MIB: u64 = 1 << 20;

    #[test]
    fn memory_that_grew_in_steps_is_one_vhost_region() {
        let memory = allocate(4 * MIB, true).unwrap();
        let memory = add_region(&memory, 4 << 30, 2 * MIB).unwrap();
        let memory = add_region(&memory, (4 << 30) + 2 * MIB, 6 * MIB).unwrap();

        let regions = vhost_regions(&memory).unwrap();

        let ranges: Vec<_> = regions
            .iter()
            .map(|region| (region.guest_phys_addr, region.memory_size, region.mmap_offset))
            .collect();
        assert_eq!(ranges, [(0, 4 * MIB, 0), (4 << 30, 8 * MIB, 4 * MIB)]);
        let ring = ring_address(&regions, (4 << 30) + 7 * MIB).unwrap();
        assert_eq!(ring, regions[1].userspace_addr + 7 * MIB);
        assert!(ring_address(&regions, 4 * MIB).is_err());
        assert!(ring_address(&regions, (4 << 30) + 8 * MIB).is_err());
    }
}
