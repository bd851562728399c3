//! virtio-net (virtio 1.3 §5.1) on a tap device of the host.
//!
//! Belongs here: the device, its configuration, and one thread per queue pair. [`worker`] is that thread, [`control`]
//! the control queue, [`tap`] a queue of the tap device, [`dhcp`] the DHCP server of a link that has a lease. A vhost
//! backend would replace the threads.

mod control;
mod dhcp;
#[cfg(any(test, fuzzing))]
mod fuzz;
mod tap;
#[cfg(test)]
pub(crate) mod tests;
mod worker;

#[cfg(any(test, fuzzing))]
pub use self::{dhcp::fuzz::answer_request, fuzz::move_packets};

use std::{io, os::fd::OwnedFd, sync::Arc};

use virtio_bindings::{
    virtio_ids::VIRTIO_ID_NET,
    virtio_net::{
        VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
        VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
        VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC,
        VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
    },
};

use self::{
    control::ControlQueue,
    dhcp::DhcpServer,
    tap::TapQueue,
    worker::{QueuePair, Worker},
};
use super::{
    device::{ActivateError, Activation, COMMON_FEATURES, Device, copy_config},
    queue::DeviceQueue,
};
use crate::{
    control::Lease,
    devices::{counters::Counters, stall_timer::StallTimer},
};

const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;

/// VIRTIO_NET_S_LINK_UP (virtio 1.3 §5.1.4). The constant of `virtio_bindings` is wider than the field.
const STATUS_LINK_UP: u16 = 1;

/// The offloads that every tap device supports.
const OFFLOADS: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN;

/// The offloads that tap devices support since Linux 6.2.
const UDP_OFFLOADS: u64 = 1 << VIRTIO_NET_F_HOST_USO | 1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6;

#[derive(Debug)]
pub(crate) struct Net {
    mac: [u8; 6],
    mtu: u16,
    /// One queue of the tap device per queue pair of the guest.
    tap_queues: Vec<Arc<TapQueue>>,
    counters: Arc<Counters>,
    udp_offloads: bool,
    dhcp: Option<Arc<DhcpServer>>,
    workers: Vec<Worker>,
}

impl Net {
    /// The device `name` on the queues of one tap device, which are non-blocking and have headers of
    /// [`crate::control::VNET_HEADER_SIZE`] bytes. `mtu` is in bytes, without the link header.
    ///
    /// # Errors
    ///
    /// `queues` is empty, or a descriptor in it is not a queue of a tap device.
    pub(crate) fn new(
        name: String,
        mac: [u8; 6],
        mtu: u16,
        queues: Vec<OwnedFd>,
        stall_timer: &Arc<StallTimer>,
    ) -> io::Result<Self> {
        let tap_queues: Vec<_> = queues.into_iter().map(|queue| Arc::new(TapQueue::new(queue))).collect();
        let first = tap_queues.first().ok_or(io::ErrorKind::InvalidInput)?;
        // This only probes for support: activation sets the offloads that the driver accepts.
        let udp_offloads = first.set_offloads(OFFLOADS | UDP_OFFLOADS).is_ok();
        first.set_offloads(0)?;
        Ok(Self {
            mac,
            mtu,
            counters: Counters::with_queues(name, tap_queues.len() * 2, stall_timer),
            tap_queues,
            udp_offloads,
            dhcp: None,
            workers: Vec::new(),
        })
    }

    /// Answers the guest's DHCP requests with `lease`, from the next activation on. The tap device then gets none of
    /// them.
    pub(crate) fn serve_lease(&mut self, lease: &Lease) {
        self.dhcp = Some(Arc::new(DhcpServer::new(lease)));
    }

    fn pairs(&self) -> u16 {
        u16::try_from(self.tap_queues.len()).unwrap_or(u16::MAX)
    }

    /// struct virtio_net_config (virtio 1.3 §5.1.4).
    fn config(&self) -> [u8; 12] {
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.mac);
        config[6..8].copy_from_slice(&STATUS_LINK_UP.to_le_bytes());
        config[8..10].copy_from_slice(&self.pairs().to_le_bytes());
        config[10..].copy_from_slice(&self.mtu.to_le_bytes());
        config
    }

    /// Starts one thread per queue pair that the driver enabled.
    fn start(&mut self, activation: Activation) -> io::Result<()> {
        let Activation { features, queues, .. } = activation;
        self.tap_queues[0].set_offloads(features)?;
        let (queue_pairs, mut control) = self.assign_queues(features, queues)?;
        // Only the first pair is active until the driver sets another number (virtio 1.3 §5.1.6.5.5).
        for (index, tap_queue) in self.tap_queues.iter().enumerate() {
            tap_queue.set_attached(index == 0)?;
        }
        for pair in queue_pairs {
            self.workers.push(Worker::start(pair, control.take())?);
        }
        Ok(())
    }

    /// Assigns the queues that the driver enabled to queue pairs and the control queue.
    fn assign_queues(
        &self,
        features: u64,
        queues: Vec<DeviceQueue>,
    ) -> io::Result<(Vec<QueuePair>, Option<ControlQueue>)> {
        let has = |feature: u32| features & 1 << feature != 0;
        let pairs = if has(VIRTIO_NET_F_MQ) { self.tap_queues.len() } else { 1 };
        let mut queues = queues.into_iter();
        let mut control = None;
        let mut queue_pairs = Vec::new();
        for tap_queue in self.tap_queues.iter().take(pairs) {
            let (Some(receive), Some(transmit)) = (queues.next(), queues.next()) else {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!("the driver enabled too few queues for {pairs} queue pairs"),
                ));
            };
            queue_pairs.push(QueuePair {
                tap: tap_queue.clone(),
                receive,
                transmit,
                mergeable_buffers: has(VIRTIO_NET_F_MRG_RXBUF),
                dhcp: self.dhcp.clone(),
                counters: self.counters.clone(),
            });
        }
        if has(VIRTIO_NET_F_CTRL_VQ)
            && let Some(queue) = queues.next()
        {
            control = Some(ControlQueue::new(
                queue,
                self.tap_queues[..pairs].to_vec(),
                self.counters.clone(),
            ));
        }
        Ok((queue_pairs, control))
    }
}

impl Device for Net {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    fn features(&self) -> u64 {
        let mut features = COMMON_FEATURES | OFFLOADS;
        features |= 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_MTU | 1 << VIRTIO_NET_F_STATUS;
        features |= 1 << VIRTIO_NET_F_MRG_RXBUF;
        if self.udp_offloads {
            features |= UDP_OFFLOADS;
        }
        if self.tap_queues.len() > 1 {
            features |= 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ;
        }
        features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![QUEUE_SIZE; self.tap_queues.len() * 2];
        if self.tap_queues.len() > 1 {
            sizes.push(CONTROL_QUEUE_SIZE);
        }
        sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&self.config(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let found = activation.queues.len();
        if found < 2 {
            return Err(ActivateError::QueueCount { found, needed: 2 });
        }
        self.start(activation)
            .inspect_err(|_| self.workers.clear())
            .map_err(|error| ActivateError::Backend(error.to_string()))
    }

    fn reset(&mut self) {
        self.workers.clear();
    }
}
