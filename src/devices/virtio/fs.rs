//! virtio-fs (virtio 1.3 §5.11): the device's face towards the guest. The queues are served by the
//! fs process over the vhost-user protocol, which maps guest memory, is kicked by KVM directly and
//! interrupts the guest directly; after activation this process has no part in it.

use std::{os::unix::net::UnixStream, sync::Arc};

use vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_user::{Frontend, VhostUserFrontend, message::VhostUserProtocolFeatures, message::VhostUserVirtioFeatures},
};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::{ActivateError, Activation, COMMON_FEATURES, Device, Memory, copy_config, mmio::Line};

/// The high-priority queue and the request queue. A request's size is bounded by its queue's.
const QUEUE_SIZES: [u16; 2] = [64, 512];

const TAG_LENGTH: usize = 36;

/// The device.
pub(crate) struct Fs {
    socket: Option<UnixStream>,
    frontend: Option<Frontend>,
    line: Arc<Line>,
    config: [u8; TAG_LENGTH + 4],
}

impl Fs {
    /// A file system with tag `tag`, served over the connected vhost-user `socket`. `line` must
    /// report every interrupt as one for used buffers ([`Line::always_used`]).
    pub(crate) fn new(tag: &str, socket: UnixStream, line: Arc<Line>) -> Self {
        let mut config = [0; TAG_LENGTH + 4];
        let length = tag.len().min(TAG_LENGTH);
        config[..length].copy_from_slice(&tag.as_bytes()[..length]);
        config[TAG_LENGTH..].copy_from_slice(&1_u32.to_le_bytes());
        Self {
            socket: Some(socket),
            frontend: None,
            line,
            config,
        }
    }

    /// The set-up messages of the vhost-user protocol, in the order that it demands.
    fn connect(&self, frontend: &mut Frontend, activation: &Activation) -> Result<(), String> {
        let step = |what: &'static str| move |error: vhost::Error| format!("{what}: {error}");
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
        let regions = activation
            .memory
            .iter()
            .map(VhostUserMemoryRegionInfo::from_guest_region)
            .collect::<Result<Vec<_>, _>>()
            .map_err(step("guest memory"))?;
        frontend.set_mem_table(&regions).map_err(step("SET_MEM_TABLE"))?;
        for (index, queue) in activation.queues.iter().enumerate() {
            let geometry = queue.geometry();
            let config = VringConfigData {
                queue_max_size: geometry.max_size(),
                queue_size: geometry.size(),
                flags: 0,
                desc_table_addr: host_address(&activation.memory, geometry.desc_table())?,
                used_ring_addr: host_address(&activation.memory, geometry.used_ring())?,
                avail_ring_addr: host_address(&activation.memory, geometry.avail_ring())?,
                log_addr: None,
            };
            frontend
                .set_vring_num(index, geometry.size())
                .map_err(step("SET_VRING_NUM"))?;
            frontend
                .set_vring_addr(index, &config)
                .map_err(step("SET_VRING_ADDR"))?;
            frontend.set_vring_base(index, 0).map_err(step("SET_VRING_BASE"))?;
            frontend
                .set_vring_call(index, self.line.irqfd())
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

/// Where guest address `address` is mapped in this process, which is how vhost-user names rings.
fn host_address(memory: &Memory, address: u64) -> Result<u64, String> {
    memory
        .get_host_address(GuestAddress(address))
        .map(|pointer| pointer.addr() as u64)
        .map_err(|error| format!("ring at {address:#x}: {error}"))
}

impl Device for Fs {
    fn kind(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES
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
            .ok_or_else(|| ActivateError::Backend("the file server serves one activation only".to_owned()))?;
        let mut frontend = Frontend::from_stream(socket, QUEUE_SIZES.len() as u64);
        self.connect(&mut frontend, &activation)
            .map_err(ActivateError::Backend)?;
        self.frontend = Some(frontend);
        Ok(())
    }

    fn reset(&mut self) {
        // The server ends with its connection. A driver that resets a running device has no use
        // for a second one: PID 1 mounts the share once.
        self.frontend = None;
    }
}

impl std::fmt::Debug for Fs {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Fs").finish_non_exhaustive()
    }
}
