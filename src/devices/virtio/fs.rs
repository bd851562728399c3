//! virtio-fs (virtio 1.3 §5.11): the frontend of the device. The fs process serves the queues over the vhost-user
//! protocol: it maps guest memory, and KVM connects its kicks and interrupts directly to the guest. After activation,
//! this process does not take part in requests.

mod connection;

use std::{
    os::{
        fd::{AsRawFd, BorrowedFd},
        unix::net::UnixStream,
    },
    sync::Arc,
};

use vhost::{
    VhostUserMemoryRegionInfo,
    vhost_user::message::{
        FrontendReq, MAX_ATTACHED_FD_ENTRIES, VhostUserMemory, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
        VhostUserVringAddr, VhostUserVringAddrFlags, VhostUserVringState,
    },
};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_queue::QueueT;
use vm_memory::{ByteValued, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use self::connection::Connection;
use super::device::{ActivateError, Activation, Device, copy_config};
use crate::{devices::counters::Counters, memory::MemoryRegions};

/// High-priority and request queue. The size of the request queue limits the size of a request.
const QUEUE_SIZES: [u16; 2] = [64, 512];

/// The length of the tag in the configuration (virtio 1.3 §5.11.4).
const TAG_LENGTH: usize = 36;

/// The connection to the file server.
enum Backend {
    /// The driver has not activated the device yet.
    Waiting(UnixStream),
    Serving(Connection),
    /// The driver has reset the device, or its activation failed: the file server uses no guest memory.
    Unused,
    /// The file server did not map new memory. The connection is closed: a late reply would be taken for the reply to
    /// the next request.
    Failed,
}

pub(crate) struct Fs {
    backend: Backend,
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
            backend: Backend::Waiting(socket),
            counters: Counters::new("fs"),
            config,
        }
    }

    /// Makes the file server map all of `memory`. Once this returns, the guest may use new regions. Waits at most
    /// [`connection::REPLY_LIMIT`].
    ///
    /// # Errors
    ///
    /// The text names the vhost-user message that failed. The file server ends then, because its connection closes.
    pub(crate) fn grow(&mut self, memory: &MemoryRegions) -> Result<(), String> {
        match &self.backend {
            // Before activation there is nothing to update: activation will send the regions of that time.
            Backend::Waiting(_) | Backend::Unused => Ok(()),
            Backend::Failed => Err("the connection to the file server has failed before".to_owned()),
            Backend::Serving(connection) => {
                let grown = share_grown_memory(connection, memory);
                if let Err(error) = &grown {
                    self.counters.add_error();
                    log::warn!(
                        target: self.counters.name(),
                        "the connection to the file server is closed, it cannot map new memory: {error}"
                    );
                    self.backend = Backend::Failed;
                }
                grown
            }
        }
    }
}

fn share_grown_memory(connection: &Connection, memory: &MemoryRegions) -> Result<(), String> {
    share_memory(connection, &vhost_regions(memory)?)?;
    // Wait for a reply. The server handles messages in order, so it has mapped the memory by then.
    connection
        .read_u64(FrontendReq::GET_FEATURES)
        .map(drop)
        .map_err(|error| error.to_string())
}

/// Sends the set-up messages of the vhost-user protocol, in the required order.
fn set_up_backend(connection: &Connection, activation: &Activation) -> Result<(), ActivateError> {
    let send = |request, body: &[u8], descriptors: &[BorrowedFd<'_>]| {
        let sent = connection.send(request, body, descriptors);
        sent.map_err(backend_failed)
    };
    let read = |request| connection.read_u64(request).map_err(backend_failed);
    let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    send(FrontendReq::SET_OWNER, &[], &[])?;
    let offered = read(FrontendReq::GET_FEATURES)?;
    if activation.features & !offered != 0 || offered & protocol == 0 {
        let reason = "the file server lacks a feature that the driver accepted";
        return Err(backend_failed(reason));
    }
    let accepted = activation.features | protocol;
    send(FrontendReq::SET_FEATURES, accepted.as_slice(), &[])?;
    let understood = read(FrontendReq::GET_PROTOCOL_FEATURES)?;
    let accepted = understood & VhostUserProtocolFeatures::MQ.bits();
    send(FrontendReq::SET_PROTOCOL_FEATURES, accepted.as_slice(), &[])?;
    let regions = vhost_regions(activation.memory.regions()).map_err(backend_failed)?;
    share_memory(connection, &regions).map_err(backend_failed)?;
    for (queue_index, queue) in (0_u16..).zip(&activation.queues) {
        let index = u32::from(queue_index);
        let interrupt = activation.interrupt.delegate(queue_index);
        let interrupt =
            interrupt.map_err(|error| backend_failed(format!("duplicate the eventfd of an interrupt: {error}")))?;
        let configuration = queue.configuration();
        let set = |request, value: u32| send(request, VhostUserVringState::new(index, value).as_slice(), &[]);
        let addresses = VhostUserVringAddr::new(
            index,
            VhostUserVringAddrFlags::empty(),
            ring_address(&regions, configuration.desc_table())?,
            ring_address(&regions, configuration.used_ring())?,
            ring_address(&regions, configuration.avail_ring())?,
            0,
        );
        set(FrontendReq::SET_VRING_NUM, configuration.size().into())?;
        send(FrontendReq::SET_VRING_ADDR, addresses.as_slice(), &[])?;
        set(FrontendReq::SET_VRING_BASE, 0)?;
        for (request, event) in [
            (FrontendReq::SET_VRING_CALL, &interrupt),
            (FrontendReq::SET_VRING_KICK, queue.kick()),
        ] {
            send(request, u64::from(index).as_slice(), &[borrow(event)])?;
        }
        set(FrontendReq::SET_VRING_ENABLE, 1)?;
    }
    Ok(())
}

fn backend_failed(reason: impl std::fmt::Display) -> ActivateError {
    ActivateError::Backend(reason.to_string())
}

/// Sends the message that makes the backend map `regions`.
fn share_memory(connection: &Connection, regions: &[VhostUserMemoryRegionInfo]) -> Result<(), String> {
    let count = u32::try_from(regions.len()).unwrap_or(u32::MAX);
    if regions.len() > MAX_ATTACHED_FD_ENTRIES {
        return Err(format!(
            "guest memory has {count} regions, but the protocol allows {MAX_ATTACHED_FD_ENTRIES}"
        ));
    }
    let mut body = VhostUserMemory::new(count).as_slice().to_vec();
    for region in regions {
        body.extend_from_slice(region.to_region().as_slice());
    }
    // SAFETY: the regions of guest memory keep the files open that they map, and outlive this function's `regions`.
    let files = regions
        .iter()
        .map(|region| unsafe { BorrowedFd::borrow_raw(region.mmap_handle) });
    connection
        .send(FrontendReq::SET_MEM_TABLE, &body, &files.collect::<Vec<_>>())
        .map_err(|error| error.to_string())
}

fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the eventfd is open for as long as it is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
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
fn ring_address(regions: &[VhostUserMemoryRegionInfo], address: u64) -> Result<u64, ActivateError> {
    let host_address = regions.iter().find_map(|region| {
        let offset = address.checked_sub(region.guest_phys_addr)?;
        (offset < region.memory_size).then_some(region.userspace_addr + offset)
    });
    host_address.ok_or(ActivateError::QueueAddress(address))
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
        let socket = match std::mem::replace(&mut self.backend, Backend::Unused) {
            Backend::Waiting(socket) => socket,
            other => {
                self.backend = other;
                return Err(ActivateError::SecondActivation);
            }
        };
        let connection = Connection::new(socket);
        set_up_backend(&connection, &activation)?;
        self.backend = Backend::Serving(connection);
        Ok(())
    }

    fn reset(&mut self) {
        // The file server exits when its connection closes. A second activation is not supported and not needed: the
        // agent mounts the share once.
        if !matches!(self.backend, Backend::Waiting(_)) {
            self.backend = Backend::Unused;
        }
    }
}

impl std::fmt::Debug for Fs {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Fs").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::unix::net::UnixStream,
        time::Instant,
    };

    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::GuestAddress;

    use super::*;
    use crate::{
        devices::{
            log_capture::LogCapture,
            virtio::mock::{InterruptCounter, device_queue},
        },
        memory::{GuestMemory, add_region, allocate},
    };

    const MIB: u64 = 1 << 20;

    /// A reply of the file server: header, and 64 bits.
    fn reply(request: FrontendReq, value: u64) -> Vec<u8> {
        let header = [u32::from(request), 5, 8].map(u32::to_ne_bytes).concat();
        [header, value.to_ne_bytes().to_vec()].concat()
    }

    /// Activates a device whose file server has sent `replies` already, and sends nothing else.
    fn activate(replies: &[Vec<u8>]) -> (Fs, UnixStream, Result<(), ActivateError>) {
        let (mut server, socket) = UnixStream::pair().unwrap();
        server.write_all(&replies.concat()).unwrap();
        let mut fs = Fs::new("share", socket);
        let memory = GuestMemory::new(allocate(4 * MIB, true).unwrap());
        let queues = (0..2).map(|index| {
            let mock = MockSplitQueue::create(memory.regions(), GuestAddress(index * 0x1000), 16);
            device_queue(&mock, &memory).0
        });
        let activation = Activation {
            features: fs.features(),
            queues: queues.collect(),
            interrupt: Arc::new(InterruptCounter::default()),
            memory: memory.clone(),
        };
        let activated = fs.activate(activation);
        (fs, server, activated)
    }

    #[test]
    fn file_server_that_hangs_fails_the_activation_and_loses_its_connection() {
        let features = reply(FrontendReq::GET_FEATURES, u64::MAX);
        for (replies, expected) in [
            (vec![], "GET_FEATURES: the file server does not reply: it hangs"),
            (
                vec![features[..7].to_vec()],
                "GET_FEATURES: the file server does not reply: it hangs",
            ),
            (
                vec![features],
                "GET_PROTOCOL_FEATURES: the file server does not reply: it hangs",
            ),
            (vec![vec![0; 20]], "GET_FEATURES: the reply is malformed"),
        ] {
            let start = Instant::now();

            let (mut fs, mut server, activated) = activate(&replies);

            assert!(start.elapsed() < 3 * connection::REPLY_LIMIT);
            let error = activated.unwrap_err().to_string();
            assert!(error.ends_with(expected), "{error}");
            server.read_to_end(&mut Vec::new()).unwrap();
            // The file server uses no memory.
            fs.grow(&allocate(4 * MIB, true).unwrap()).unwrap();
        }
    }

    #[test]
    fn second_activation_is_a_fault_of_the_driver_and_changes_nothing() {
        let features = reply(FrontendReq::GET_FEATURES, u64::MAX);
        let (mut fs, _server, activated) = activate(&[
            features.clone(),
            reply(FrontendReq::GET_PROTOCOL_FEATURES, u64::MAX),
            features,
        ]);
        activated.unwrap();
        let memory = GuestMemory::new(allocate(4 * MIB, true).unwrap());

        let again = fs.activate(Activation {
            features: fs.features(),
            queues: Vec::new(),
            interrupt: Arc::new(InterruptCounter::default()),
            memory: memory.clone(),
        });

        assert!(matches!(again, Err(ActivateError::SecondActivation)), "{again:?}");
        fs.grow(memory.regions()).unwrap();
    }

    #[test]
    fn file_server_that_hangs_fails_the_growth_and_loses_its_connection() {
        let features = reply(FrontendReq::GET_FEATURES, u64::MAX);
        let (mut fs, mut server, activated) =
            activate(&[features, reply(FrontendReq::GET_PROTOCOL_FEATURES, u64::MAX)]);
        activated.unwrap();
        let log = LogCapture::on_this_thread("fs");
        let start = Instant::now();

        let grown = fs.grow(&allocate(4 * MIB, true).unwrap());

        assert_eq!(
            grown.unwrap_err(),
            "GET_FEATURES: the file server does not reply: it hangs"
        );
        assert!(start.elapsed() < 2 * connection::REPLY_LIMIT);
        assert_eq!((fs.counters().read().errors, log.lines().len()), (1, 1));
        server.read_to_end(&mut Vec::new()).unwrap();
        // A later request cannot take a late reply for its own.
        fs.grow(&allocate(4 * MIB, true).unwrap()).unwrap_err();
    }

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
