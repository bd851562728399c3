//! virtio-net (virtio 1.3 §5.1) over a tap device of the host.
//!
//! [`worker`] moves the packets of a pair of queues, [`control`] answers the control queue, [`tap`]
//! has the calls that only a tap device knows; here is the device: its configuration, and a thread
//! for each pair. Another backend (vhost) would take the place of the threads.

mod control;
mod tap;
#[cfg(test)]
mod tests;
mod worker;

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
    control::Control,
    tap::Tap,
    worker::{Pair, Worker},
};
use super::{ActivateError, Activation, COMMON_FEATURES, Device, copy_config};

const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;

/// The status of the link (virtio 1.3 §5.1.4), whose constant is wider than the field.
const LINK_UP: u16 = 1;

/// What a tap device always does for its driver.
const OFFLOADS: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN;

/// What newer hosts' do (Linux 6.2).
const UDP_OFFLOADS: u64 = 1 << VIRTIO_NET_F_HOST_USO | 1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6;

/// The device.
#[derive(Debug)]
pub(crate) struct Net {
    mac: [u8; 6],
    mtu: u16,
    /// A queue of the tap device for each pair of the guest's.
    taps: Vec<Arc<Tap>>,
    udp_offloads: bool,
    workers: Vec<Worker>,
}

impl Net {
    /// A device whose other end are the queues of one tap device: non-blocking, with headers of
    /// [`worker::HEADER`] bytes.
    ///
    /// # Errors
    ///
    /// There is no queue, or it is none of a tap device.
    pub(crate) fn new(mac: [u8; 6], mtu: u16, queues: Vec<OwnedFd>) -> io::Result<Self> {
        let taps: Vec<_> = queues.into_iter().map(|queue| Arc::new(Tap::new(queue))).collect();
        let first = taps.first().ok_or(io::ErrorKind::InvalidInput)?;
        // Set for good when the driver has chosen.
        let udp_offloads = first.set_offloads(OFFLOADS | UDP_OFFLOADS).is_ok();
        first.set_offloads(0)?;
        Ok(Self {
            mac,
            mtu,
            taps,
            udp_offloads,
            workers: Vec::new(),
        })
    }

    fn pairs(&self) -> u16 {
        u16::try_from(self.taps.len()).unwrap_or(u16::MAX)
    }

    /// The configuration (virtio 1.3 §5.1.4).
    fn config(&self) -> [u8; 12] {
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.mac);
        config[6..8].copy_from_slice(&LINK_UP.to_le_bytes());
        config[8..10].copy_from_slice(&self.pairs().to_le_bytes());
        config[10..].copy_from_slice(&self.mtu.to_le_bytes());
        config
    }

    /// Starts a thread for each pair of queues that the driver set up.
    fn start(&mut self, activation: Activation) -> io::Result<()> {
        let Activation { features, queues, .. } = activation;
        self.taps[0].set_offloads(features)?;
        let has = |feature: u32| features & 1 << feature != 0;
        let pairs = if has(VIRTIO_NET_F_MQ) { self.taps.len() } else { 1 };
        let mut queues = queues.into_iter();
        let mut control = None;
        let mut made = Vec::new();
        for tap in self.taps.iter().take(pairs) {
            let (Some(receive), Some(transmit)) = (queues.next(), queues.next()) else {
                return Err(io::ErrorKind::InvalidInput.into());
            };
            made.push(Pair {
                tap: tap.clone(),
                receive,
                transmit,
                merges: has(VIRTIO_NET_F_MRG_RXBUF),
            });
        }
        // One pair is in use until the driver says otherwise (virtio 1.3 §5.1.6.5.5).
        for (index, tap) in self.taps.iter().enumerate() {
            tap.set_attached(index == 0)?;
        }
        if has(VIRTIO_NET_F_CTRL_VQ)
            && let Some(queue) = queues.next()
        {
            control = Some(Control::new(queue, self.taps[..pairs].to_vec()));
        }
        for pair in made {
            self.workers.push(Worker::start(pair, control.take())?);
        }
        Ok(())
    }
}

impl Device for Net {
    fn kind(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        let mut features = COMMON_FEATURES | OFFLOADS;
        features |= 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_MTU | 1 << VIRTIO_NET_F_STATUS;
        features |= 1 << VIRTIO_NET_F_MRG_RXBUF;
        if self.udp_offloads {
            features |= UDP_OFFLOADS;
        }
        if self.taps.len() > 1 {
            features |= 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ;
        }
        features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![QUEUE_SIZE; self.taps.len() * 2];
        if self.taps.len() > 1 {
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
