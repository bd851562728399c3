//! The entry point of the fuzz target for network devices. A datagram socket takes the place of the tap device, and the
//! target calls each turn of a worker.

#![allow(clippy::unwrap_used, reason = "a fuzz target fails by panic")]

use std::os::unix::net::UnixDatagram;

use arbitrary::{Result, Unstructured};
use vmm_sys_util::eventfd::EventFd;

use super::{
    dhcp::fuzz::lease,
    worker::{Due, HEADER_SIZE, MAX_PACKET_SIZE, PacketLoop},
    *,
};
use crate::devices::virtio::{
    device::SharedDevice,
    fuzz::{
        driver::{Driver, Subject},
        guest::Request,
    },
};

/// A device whose queues wait for [`NetSubject`] instead of a thread for each pair.
struct UnservedNet {
    net: Net,
    /// The queues of the last activation, until the subject takes them.
    queues: Vec<(QueuePair, Option<ControlQueue>)>,
    /// The number of resets.
    resets: u32,
}

/// A worker with its state between two turns.
struct Turns {
    packets: PacketLoop,
    epoll: OwnedFd,
    due: Due,
    /// The kick of the transmit queue. Signalled before each turn, so that the turn does not wait.
    kick: EventFd,
    /// The kick of the control queue, if the worker serves it.
    control_kick: Option<EventFd>,
    stop: EventFd,
    has_ended: bool,
}

impl Turns {
    fn new(pair: QueuePair, control: Option<ControlQueue>) -> io::Result<Self> {
        let kick = pair.transmit.kick().try_clone()?;
        let control_kick = control.as_ref().map(|control| control.kick().try_clone());
        let stop = EventFd::new(0)?;
        let packets = PacketLoop::new(pair, control);
        Ok(Self {
            epoll: packets.watch(&stop)?,
            packets,
            due: Due::default(),
            kick,
            control_kick: control_kick.transpose()?,
            stop,
            has_ended: false,
        })
    }

    /// Returns `false` if the worker has ended.
    fn turn(&mut self) -> bool {
        self.kick.write(1).unwrap();
        self.packets.turn(&self.epoll, &mut self.due).unwrap_or(false)
    }
}

impl Device for UnservedNet {
    fn device_id(&self) -> u32 {
        self.net.device_id()
    }

    fn counters(&self) -> Arc<Counters> {
        self.net.counters()
    }

    fn features(&self) -> u64 {
        self.net.features()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        self.net.queue_sizes()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.net.read_config(offset, data);
    }

    fn activate(&mut self, activation: Activation) -> std::result::Result<(), ActivateError> {
        let failed = |error: io::Error| ActivateError::Backend(error.to_string());
        let Activation { features, queues, .. } = activation;
        let (pairs, mut control) = self.net.assign_queues(features, queues).map_err(failed)?;
        self.queues = pairs.into_iter().map(|pair| (pair, control.take())).collect();
        Ok(())
    }

    fn reset(&mut self) {
        self.queues.clear();
        self.resets += 1;
    }
}

struct NetSubject {
    device: SharedDevice<UnservedNet>,
    loops: Vec<Turns>,
    /// The resets that were seen.
    resets: u32,
    networks: Vec<Option<UnixDatagram>>,
    serves_lease: bool,
}

impl NetSubject {
    /// Starts and stops workers as the device has done.
    fn update_workers(&mut self) {
        let device = &mut *self.device.lock();
        if device.resets != self.resets {
            self.resets = device.resets;
            for mut turns in self.loops.drain(..) {
                turns.stop.write(1).unwrap();
                assert!(turns.has_ended || !turns.turn(), "a worker that was stopped continues");
            }
        }
        for (pair, control) in device.queues.drain(..) {
            self.loops.push(Turns::new(pair, control).unwrap());
        }
    }
}

/// Interprets `data`, whose first two bytes select the device, as packets of a driver and of a network.
///
/// # Panics
///
/// If a packet reaches the network that is too short, too long, or for the DHCP server of the device.
pub fn move_packets(data: &[u8]) {
    let Some(([selection, lease_selection], data)) = data.split_first_chunk() else {
        return;
    };
    let queues = usize::from(selection & 1) + 1;
    let mut tap_queues = Vec::new();
    let mut networks = Vec::new();
    for _ in 0..queues {
        let (device, network) = UnixDatagram::pair().unwrap();
        device.set_nonblocking(true).unwrap();
        network.set_nonblocking(true).unwrap();
        tap_queues.push(Arc::new(TapQueue::new(device.into())));
        networks.push(Some(network));
    }
    let timer = Arc::new(StallTimer::new().unwrap());
    let mut net = Net {
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1500,
        counters: Counters::with_queues("net", queues * 2, &timer),
        tap_queues,
        udp_offloads: selection & 2 != 0,
        dhcp: None,
        workers: Vec::new(),
    };
    let serves_lease = selection & 4 != 0;
    if serves_lease {
        net.serve_lease(&lease(*lease_selection));
    }
    let device = SharedDevice::new(UnservedNet {
        net,
        queues: Vec::new(),
        resets: 0,
    });
    let kicks = Driver::kicks(&device);
    let mut subject = NetSubject {
        device: device.clone(),
        loops: Vec::new(),
        resets: 0,
        networks,
        serves_lease,
    };
    Driver::new(Box::new(device), kicks).run(&mut Unstructured::new(data), &mut subject);
}

impl Subject for NetSubject {
    fn request(&mut self, input: &mut Unstructured<'_>, queue: usize) -> Result<Request> {
        if queue == self.networks.len() * 2 {
            let pairs = u16::from(input.int_in_range(0..=3_u8)?).to_le_bytes();
            let class = if input.ratio(7_u8, 8)? { 4 } else { input.arbitrary()? };
            return Ok(Request {
                readable: vec![class, input.arbitrary::<u8>()? & 1, pairs[0], pairs[1]],
                writable: vec![1],
            });
        }
        if queue.is_multiple_of(2) {
            let size = match input.int_in_range(0..=3_u8)? {
                0 => 70_000,
                1 => 1526,
                2 => u32::from(input.arbitrary::<u16>()?),
                _ => u32::from(input.arbitrary::<u8>()?),
            };
            return Ok(Request {
                readable: Vec::new(),
                writable: vec![size],
            });
        }
        let mut readable = vec![0; HEADER_SIZE];
        if self.serves_lease && input.arbitrary()? {
            readable.extend(dhcp_frame(input)?);
        } else {
            let length = match input.int_in_range(0..=7_u8)? {
                0 => 0xfff0 + usize::from(input.arbitrary::<u8>()?),
                1 => usize::from(input.arbitrary::<u16>()?),
                _ => usize::from(input.arbitrary::<u8>()?),
            };
            readable.resize(length, b'g');
        }
        Ok(Request {
            readable,
            writable: Vec::new(),
        })
    }

    fn serve(&mut self, queue: usize) {
        self.update_workers();
        let is_control = queue == self.networks.len() * 2;
        let worker = if is_control { 0 } else { queue / 2 };
        // A worker ends when its queue is broken. The others continue.
        if let Some(turns) = self.loops.get_mut(worker).filter(|turns| !turns.has_ended) {
            if let Some(kick) = turns.control_kick.as_ref().filter(|_| is_control) {
                kick.write(1).unwrap();
            }
            turns.has_ended = !turns.turn();
        }
    }

    fn act_on_host(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let index = input.int_in_range(0..=self.networks.len() - 1)?;
        let action = input.int_in_range(0..=15_u8)?;
        let Some(network) = &self.networks[index] else {
            return Ok(());
        };
        match action {
            0 => self.networks[index] = None,
            1..=9 => {
                let length = match input.int_in_range(0..=3_u8)? {
                    0 => usize::from(input.arbitrary::<u16>()?) + 100,
                    1 => 1526,
                    _ => HEADER_SIZE + usize::from(input.arbitrary::<u8>()?),
                };
                // A full socket takes nothing.
                let _ = network.send(&vec![b'n'; length]);
            }
            _ => {
                let mut packet = vec![0; MAX_PACKET_SIZE + 1];
                while let Ok(length) = network.recv(&mut packet) {
                    assert!((HEADER_SIZE..=MAX_PACKET_SIZE).contains(&length), "{length}");
                    let frame = &packet[HEADER_SIZE..length];
                    assert!(!self.serves_lease || !dhcp::is_for_server(frame));
                }
            }
        }
        let _ = self.device.lock().counters().pending();
        Ok(())
    }

    fn check(&mut self, _driver: &Driver) {
        self.update_workers();
    }
}

/// A frame that a DHCP client may send.
fn dhcp_frame(input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let mut options = vec![99, 130, 83, 99, 53, 1, input.int_in_range(1..=8_u8)?];
    for _ in 0..input.int_in_range(0..=3_u8)? {
        let code = *input.choose(&[50_u8, 54, 55, 57, 61, 12, 0, 82])?;
        let length = if input.ratio(3_u8, 4)? {
            4
        } else {
            input.arbitrary::<u8>()? & 0x3f
        };
        options.extend([code, length]);
        options.extend(input.bytes(usize::from(length).min(input.len()))?);
    }
    options.push(255);
    let mut message = vec![0; 236];
    message[..4].copy_from_slice(&[1, 1, 6, 0]);
    message[10] = input.arbitrary::<u8>()? & 0x80;
    message[28..34].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
    message.extend(options);
    let size = |bytes: usize| u16::try_from(bytes).unwrap().to_be_bytes();
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 1, 8, 0]);
    frame.extend([0x45, 0]);
    frame.extend(size(28 + message.len()));
    frame.extend([0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255]);
    frame.extend([0, 68, 0, 67]);
    frame.extend(size(8 + message.len()));
    frame.extend([0, 0]);
    frame.extend(message);
    if input.ratio(1_u8, 8)? {
        frame.truncate(usize::from(input.arbitrary::<u16>()? & 0x1ff));
    }
    Ok(frame)
}
