//! virtio-fs (virtio 1.3 §5.11): the frontend of the device. The fs process serves the queues over the vhost-user
//! protocol: it maps guest memory, and KVM connects its kicks and interrupts directly to the guest. After activation,
//! this process does not take part in requests.

mod connection;
#[cfg(any(test, fuzzing))]
mod fuzz;

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
        FrontendReq, VhostUserMemory, VhostUserProtocolFeatures, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
        VhostUserVringAddr, VhostUserVringAddrFlags, VhostUserVringState,
    },
};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_queue::QueueT;
use vm_memory::{ByteValued, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use self::connection::Connection;
#[cfg(any(test, fuzzing))]
pub use self::fuzz::receive_replies;
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
    Serving {
        connection: Connection,
        /// How many regions of guest memory it maps: the first ones, since memory only grows.
        mapped_regions: usize,
    },
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

    /// Makes the file server map the regions of `memory` that are new. Once this returns, the guest may use them. Waits
    /// at most [`connection::REPLY_LIMIT`].
    ///
    /// # Errors
    ///
    /// The text names the vhost-user message that failed. The file server ends then, because its connection closes.
    pub(crate) fn grow(&mut self, memory: &MemoryRegions) -> Result<(), String> {
        match &mut self.backend {
            // Before activation there is nothing to update: activation will send the regions of that time.
            Backend::Waiting(_) | Backend::Unused => Ok(()),
            Backend::Failed => Err("the connection to the file server has failed before".to_owned()),
            Backend::Serving {
                connection,
                mapped_regions,
            } => {
                let grown = share_grown_memory(connection, memory, mapped_regions);
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

/// Shares the regions of `memory` after the first `mapped_regions`, and adds their number to it.
fn share_grown_memory(
    connection: &Connection,
    memory: &MemoryRegions,
    mapped_regions: &mut usize,
) -> Result<(), String> {
    let regions = vhost_regions(memory)?;
    for region in regions.iter().skip(*mapped_regions) {
        add_region(connection, region)?;
    }
    // Wait for a reply. The server handles messages in order, so it has mapped the memory by then.
    connection
        .read_u64(FrontendReq::GET_FEATURES)
        .map_err(|error| error.to_string())?;
    *mapped_regions = regions.len();
    Ok(())
}

/// Sends the set-up messages of the vhost-user protocol, in the required order.
///
/// Returns how many regions of guest memory it shares.
fn set_up_backend(connection: &Connection, activation: &Activation) -> Result<usize, ActivateError> {
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
    let used = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
    let accepted = understood & used.bits();
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
    Ok(regions.len())
}

fn backend_failed(reason: impl std::fmt::Display) -> ActivateError {
    ActivateError::Backend(reason.to_string())
}

/// Makes the backend map `regions`.
///
/// Sends the file of each region only once: the file server closes it as soon as it is mapped, while it has not seen a
/// request of the guest yet, and code that takes it over later could shrink the file of boot memory.
fn share_memory(connection: &Connection, regions: &[VhostUserMemoryRegionInfo]) -> Result<(), String> {
    let Some((first, others)) = regions.split_first() else {
        return Err("guest memory has no regions".to_owned());
    };
    let mut table = VhostUserMemory::new(1).as_slice().to_vec();
    table.extend_from_slice(first.to_region().as_slice());
    connection
        .send(FrontendReq::SET_MEM_TABLE, &table, &[file_of(first)])
        .map_err(|error| error.to_string())?;
    others.iter().try_for_each(|region| add_region(connection, region))
}

/// Makes the backend map one more region.
fn add_region(connection: &Connection, region: &VhostUserMemoryRegionInfo) -> Result<(), String> {
    let body = VhostUserSingleMemoryRegion::new(
        region.guest_phys_addr,
        region.memory_size,
        region.userspace_addr,
        region.mmap_offset,
    );
    connection
        .send(FrontendReq::ADD_MEM_REG, body.as_slice(), &[file_of(region)])
        .map_err(|error| error.to_string())
}

fn file_of(region: &VhostUserMemoryRegionInfo) -> BorrowedFd<'_> {
    // SAFETY: the region of guest memory keeps the file open that it maps, and is never unmapped.
    unsafe { BorrowedFd::borrow_raw(region.mmap_handle) }
}

fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the eventfd is open for as long as it is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// The regions of guest memory, in the order of their addresses.
fn vhost_regions(memory: &MemoryRegions) -> Result<Vec<VhostUserMemoryRegionInfo>, String> {
    memory
        .iter()
        .map(|region| {
            VhostUserMemoryRegionInfo::from_guest_region(region)
                .map_err(|error| format!("cannot share a region of guest memory: {error}"))
        })
        .collect()
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
        let mapped_regions = set_up_backend(&connection, &activation)?;
        self.backend = Backend::Serving {
            connection,
            mapped_regions,
        };
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
        memory::{GuestMemory, add_region, allocate, create_sealed_file},
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
        let memory = GuestMemory::new(allocate(4 * MIB, Some(create_sealed_file().unwrap())).unwrap());
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
            fs.grow(&allocate(4 * MIB, Some(create_sealed_file().unwrap())).unwrap())
                .unwrap();
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
        let memory = GuestMemory::new(allocate(4 * MIB, Some(create_sealed_file().unwrap())).unwrap());

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

        let grown = fs.grow(&allocate(4 * MIB, Some(create_sealed_file().unwrap())).unwrap());

        assert_eq!(
            grown.unwrap_err(),
            "GET_FEATURES: the file server does not reply: it hangs"
        );
        assert!(start.elapsed() < 2 * connection::REPLY_LIMIT);
        assert_eq!((fs.counters().read().errors, log.lines().len()), (1, 1));
        server.read_to_end(&mut Vec::new()).unwrap();
        // A later request cannot take a late reply for its own.
        fs.grow(&allocate(4 * MIB, Some(create_sealed_file().unwrap())).unwrap())
            .unwrap_err();
    }

    #[test]
    fn ring_is_named_by_its_address_in_this_process() {
        let memory = allocate(4 * MIB, Some(create_sealed_file().unwrap())).unwrap();
        let memory = add_region(&memory, 4 << 30, 8 * MIB).unwrap();

        let regions = vhost_regions(&memory).unwrap();

        let ring = ring_address(&regions, (4 << 30) + 7 * MIB).unwrap();
        assert_eq!(ring, regions[1].userspace_addr + 7 * MIB);
        assert!(ring_address(&regions, 4 * MIB).is_err());
        assert!(ring_address(&regions, (4 << 30) + 8 * MIB).is_err());
    }

    #[test]
    fn file_of_each_region_is_sent_once() {
        let features = reply(FrontendReq::GET_FEATURES, u64::MAX);
        let (mut fs, mut server, activated) = activate(&[
            features.clone(),
            reply(FrontendReq::GET_PROTOCOL_FEATURES, u64::MAX),
            features.clone(),
            features,
        ]);
        activated.unwrap();
        let boot_memory = allocate(4 * MIB, Some(create_sealed_file().unwrap())).unwrap();
        let grown = add_region(&boot_memory, 4 << 30, 2 * MIB).unwrap();
        let grown_twice = add_region(&grown, (4 << 30) + 2 * MIB, 6 * MIB).unwrap();

        fs.grow(&grown).unwrap();
        fs.grow(&grown_twice).unwrap();

        drop(fs);
        let mut messages = Vec::new();
        server.read_to_end(&mut messages).unwrap();
        let mut sent = Vec::new();
        let mut rest = messages.as_slice();
        while let Some((header, after)) = rest.split_at_checked(12) {
            let field = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
            let (body, next) = after.split_at(field(8).try_into().unwrap());
            rest = next;
            if [FrontendReq::SET_MEM_TABLE.into(), FrontendReq::ADD_MEM_REG.into()].contains(&field(0)) {
                let guest_address = u64::from_ne_bytes(body[8..16].try_into().unwrap());
                sent.push((FrontendReq::try_from(field(0)).unwrap(), guest_address));
            }
        }
        assert_eq!(
            sent,
            [
                (FrontendReq::SET_MEM_TABLE, 0),
                (FrontendReq::ADD_MEM_REG, 4 << 30),
                (FrontendReq::ADD_MEM_REG, (4 << 30) + 2 * MIB),
            ]
        );
    }
}
