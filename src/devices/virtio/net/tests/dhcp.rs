//! Tests of a link with a lease, as a driver sees it, and with a DHCP client. The server's module has the tests of all
//! answers.

use std::{
    collections::HashMap,
    fs,
    io::Write,
    os::fd::AsFd,
    path::Path,
    process::{Command, Stdio},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    process::{Pid, PidfdFlags, pidfd_open},
};

use super::{
    kernel::{create_tap, in_new_namespace},
    *,
};
use crate::devices::virtio::net::{
    dhcp::{
        is_for_server,
        tests::{
            bridge_lease, calico_lease,
            client::{discover_frame, udp_frame},
        },
    },
    worker::HEADER_SIZE,
};

/// The address of the guest's packets. Receive buffers are at [`BUFFERS`].
const PACKETS: u64 = 0x8_0000;

/// A vnet header with VIRTIO_NET_HDR_F_NEEDS_CSUM, for a UDP checksum.
const PARTIAL_CHECKSUM: [u8; HEADER_SIZE] = [1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0];

/// The device's side and the driver's side of a link.
struct Link<'m> {
    memory: &'m GuestMemory,
    receive: MockSplitQueue<'m, MemoryRegions>,
    transmit: MockSplitQueue<'m, MemoryRegions>,
    tap: Arc<TapQueue>,
    network: UnixDatagram,
}

impl<'m> Link<'m> {
    fn new(memory: &'m GuestMemory) -> Self {
        let (tap, network) = link();
        Self {
            memory,
            receive: MockSplitQueue::new(&**memory, 64),
            transmit: MockSplitQueue::create(&**memory, GuestAddress(0x8000), 128),
            tap,
            network,
        }
    }

    /// Makes the guest's frames available, each in two buffers: header and frame.
    fn transmit(&self, frames: &[Vec<u8>]) {
        let table = self.transmit.desc_table();
        let mut address = PACKETS;
        for (number, frame) in (0..).zip(frames) {
            let packet = [&PARTIAL_CHECKSUM[..], frame].concat();
            self.memory.write_slice(&packet, GuestAddress(address)).unwrap();
            let (header, body) = (number * 2, number * 2 + 1);
            let header_length = u32::try_from(HEADER_SIZE).unwrap();
            let body_length = u32::try_from(frame.len()).unwrap();
            let body_address = address + u64::from(header_length);
            table
                .store(header, descriptor(address, header_length, NEXT, body))
                .unwrap();
            table.store(body, descriptor(body_address, body_length, 0, 0)).unwrap();
            self.transmit
                .avail()
                .ring()
                .ref_at(number.into())
                .unwrap()
                .store(header);
            address += packet.len() as u64;
        }
        self.transmit.avail().idx().store(u16::try_from(frames.len()).unwrap());
    }

    /// A queue pair, with a DHCP server if `lease` is true, and the counter of the receive queue's interrupts.
    fn pair(&self, lease: bool, counters: &Arc<Counters>) -> (QueuePair, Arc<InterruptCounter>) {
        let mut pair = pair(&self.tap, &self.receive, &self.transmit, self.memory);
        let (receive, interrupts) = device_queue(&self.receive, self.memory);
        pair.receive = receive;
        pair.dhcp = lease.then(|| Arc::new(DhcpServer::new(&bridge_lease())));
        pair.counters = counters.clone();
        (pair, interrupts)
    }

    /// The frames that reach the tap device, without their headers.
    fn frames_at_tap(&self) -> Vec<Vec<u8>> {
        self.network.set_nonblocking(true).unwrap();
        let mut packet = [0; 4096];
        std::iter::from_fn(|| {
            let length = self.network.recv(&mut packet).ok()?;
            Some(packet[HEADER_SIZE..length].to_vec())
        })
        .collect()
    }

    /// The packet in the receive buffers from `offset` on.
    fn received(&self, offset: u64, length: u32) -> Vec<u8> {
        let mut packet = vec![0; length as usize];
        self.memory
            .read_slice(&mut packet, GuestAddress(BUFFERS + offset))
            .unwrap();
        packet
    }
}

/// The answer to [`discover_frame`].
fn offer_frame() -> Vec<u8> {
    let server = DhcpServer::new(&bridge_lease());
    server.answer(&discover_frame()).unwrap().unwrap().frame
}

#[test]
fn discover_is_answered_by_the_device_and_other_packets_pass() {
    let memory = memory();
    let link = Link::new(&memory);
    let counters = Counters::new("net-test");
    offer(&link.receive, &[2000; 8], WRITE);
    let others = [udp_frame(68, b"other port"), udp_frame(53, b"name")];
    link.transmit(&[others[0].clone(), discover_frame(), others[1].clone()]);

    let (pair, interrupts) = link.pair(true, &counters);
    let worker = Worker::start(pair, None).unwrap();
    wait_for_used(&link.transmit, 3);
    wait_for_used(&link.receive, 1);
    drop(worker);

    assert_eq!(link.frames_at_tap(), others);
    let expected = offer_frame();
    let [(0, length)] = used(&link.receive)[..] else {
        panic!("{:?}", used(&link.receive));
    };
    let packet = link.received(0, length);
    // No flags, no offload, and one buffer.
    assert_eq!(packet[..HEADER_SIZE], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(packet[HEADER_SIZE..], expected);
    assert_eq!(interrupts.used.load(Ordering::SeqCst), 1);
    let sent: usize = [&others[0], &others[1], &discover_frame()].map(Vec::len).iter().sum();
    let counters = counters.read();
    assert_eq!((counters.requests, counters.errors), (4, 0));
    assert_eq!(counters.bytes_to_guest, expected.len() as u64);
    assert_eq!(counters.bytes_from_guest, sent as u64);
}

#[test]
fn without_a_lease_requests_reach_the_tap_device() {
    let memory = memory();
    let link = Link::new(&memory);
    offer(&link.receive, &[2000; 8], WRITE);
    link.transmit(&[discover_frame()]);

    let (pair, _) = link.pair(false, &Counters::new("net-test"));
    let worker = Worker::start(pair, None).unwrap();
    wait_for_used(&link.transmit, 1);
    drop(worker);

    assert_eq!(link.frames_at_tap(), [discover_frame()]);
    assert_eq!(used(&link.receive), []);
}

#[test]
fn answer_and_packets_of_the_network_share_the_buffers() {
    let memory = memory();
    let link = Link::new(&memory);
    offer(&link.receive, &[200, 200, 200, 200, 70_000, 70_000], WRITE);
    link.transmit(&[discover_frame()]);
    link.network.send(&[7; 100]).unwrap();

    let (pair, _) = link.pair(true, &Counters::new("net-test"));
    let worker = Worker::start(pair, None).unwrap();
    // The packet of the network comes first: the worker starts with a turn in that direction.
    let answer = [&[0; HEADER_SIZE][..], &offer_frame()].concat();
    let buffers = u16::try_from(answer.len().div_ceil(200)).unwrap();
    wait_for_used(&link.receive, 1 + buffers);
    link.network.send(&[9; 50]).unwrap();
    wait_for_used(&link.receive, 2 + buffers);
    drop(worker);

    assert_eq!(link.received(0, 10), [7; 10]);
    let packet = link.received(200, u32::try_from(answer.len()).unwrap());
    assert_eq!(packet[10..12], buffers.to_le_bytes());
    assert_eq!(packet[HEADER_SIZE..], answer[HEADER_SIZE..]);
    let last = used(&link.receive)[usize::from(buffers) + 1];
    assert_eq!(last, (u32::from(buffers) + 1, 50));
}

#[test]
fn flood_of_requests_gets_only_the_answers_for_which_there_are_buffers() {
    let cases = [
        ("net-dhcp-mergeable", true, [2000, 2000]),
        ("net-dhcp-single", false, [2000, 100]),
    ];
    for (name, mergeable_buffers, lengths) in cases {
        let log = LogCapture::start(name);
        let memory = memory();
        let link = Link::new(&memory);
        let counters = Counters::new(name);
        offer(&link.receive, &lengths, WRITE);
        link.transmit(&vec![discover_frame(); 60]);

        let (mut pair, _) = link.pair(true, &counters);
        pair.mergeable_buffers = mergeable_buffers;
        let worker = Worker::start(pair, None).unwrap();
        wait_for_used(&link.transmit, 60);
        drop(worker);

        let fitting = lengths.iter().filter(|length| **length == 2000).count();
        assert_eq!(used(&link.receive).len(), fitting, "{name}");
        assert_eq!(link.frames_at_tap(), [[0; 0]; 0], "{name}");
        let dropped = 60 - fitting;
        let lines = log.lines();
        let text = "queue 0: the answer to a DHCP request is dropped: the guest has provided no space for it";
        assert_eq!(lines, vec![text; dropped], "{name}");
        assert_eq!(counters.read().errors, dropped as u64, "{name}");
    }
}

#[test]
fn malformed_and_shortened_exchanges_are_logged_and_counted() {
    let log = LogCapture::start("net-dhcp-malformed");
    let memory = memory();
    let link = Link::new(&memory);
    let counters = Counters::new("net-dhcp-malformed");
    offer(&link.receive, &[2000; 8], WRITE);
    let mut oversized = udp_frame(67, &[0; 3000]);
    oversized[42] = 1;
    let mut long_identifier = discover_frame();
    long_identifier.truncate(long_identifier.len() - 1);
    long_identifier.extend([61, 255]);
    long_identifier.extend([1; 255]);
    let length = u16::try_from(long_identifier.len() - 14).unwrap();
    long_identifier[16..18].copy_from_slice(&length.to_be_bytes());
    long_identifier[38..40].copy_from_slice(&(length - 20).to_be_bytes());
    link.transmit(&[udp_frame(67, b"short"), oversized, long_identifier]);

    let (pair, _) = link.pair(true, &counters);
    let worker = Worker::start(pair, None).unwrap();
    wait_for_used(&link.transmit, 3);
    wait_for_used(&link.receive, 1);
    drop(worker);

    let dropped = "queue 0: a DHCP request of the guest is dropped: it is incomplete or longer than 1514 bytes";
    let shortened = "queue 0: the answer to a DHCP request has no space for all values of the options [12, 15, 119]: \
                     the guest accepts only short answers";
    assert_eq!(log.lines(), [dropped, dropped, shortened]);
    assert_eq!(link.frames_at_tap(), [[0; 0]; 0]);
    assert_eq!((used(&link.receive).len(), counters.read().errors), (1, 3));
}

#[test]
fn broken_receive_queue_ends_the_worker_that_answers() {
    let memory = memory();
    let link = Link::new(&memory);
    link.transmit(&[discover_frame()]);
    let counters = Counters::new("net-dhcp-broken");
    // Smaller than a vnet header.
    offer(&link.receive, &[11], WRITE);

    let (pair, _) = link.pair(true, &counters);
    let worker = Worker::start(pair, None).unwrap();
    wait_for_end(&link.tap);
    drop(worker);

    assert_eq!(counters.read().errors, 1);
    assert_eq!(link.frames_at_tap(), [[0; 0]; 0]);
}

/// Writes an executable file in another process. If this process had the file open for writing, a child that another
/// test is starting could inherit the descriptor, and the execution of the file would fail with ETXTBSY.
fn write_script(path: &Path, text: &str) {
    let mut install = Command::new("install")
        .args(["-m", "755", "/dev/stdin"])
        .arg(path)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    install.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    assert!(install.wait().unwrap().success());
}

/// Runs BusyBox's DHCP client on the network's side of a tap device, whose other side has a server with `lease`.
/// Returns what the client's script gets when the client has an address.
fn run_client(lease: &Lease) -> HashMap<String, String> {
    let folder = tempfile::tempdir().unwrap();
    let (script, output) = (folder.path().join("script"), folder.path().join("output"));
    write_script(&script, "#!/bin/sh\nif [ \"$1\" = bound ]; then env >\"$OUTPUT\"; fi\n");
    let tap = create_tap(1).remove(0);
    let server = DhcpServer::new(lease);
    let client = Command::new("busybox")
        .args([
            "udhcpc",
            "-f",
            "-q",
            "-n",
            "-i",
            "tap0",
            "-O",
            "mtu",
            "-O",
            "search",
            "-O",
            "staticroutes",
            "-s",
        ])
        .arg(&script)
        .env("OUTPUT", &output)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let ended = pidfd_open(Pid::from_child(&client), PidfdFlags::empty()).unwrap();
    let mut packet = [0; 4096];
    loop {
        let mut events = [PollFd::new(&tap, PollFlags::IN), PollFd::new(&ended, PollFlags::IN)];
        poll(&mut events, None).unwrap();
        if !events[1].revents().is_empty() {
            break;
        }
        let length = rustix::io::read(&tap, &mut packet).unwrap();
        let frame = &packet[HEADER_SIZE..length];
        if is_for_server(frame)
            && let Some(answer) = server.answer(frame).unwrap()
        {
            rustix::io::write(tap.as_fd(), &[&[0; HEADER_SIZE][..], &answer.frame].concat()).unwrap();
        }
    }
    let result = client.wait_with_output().unwrap();
    assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
    let text = fs::read_to_string(output).unwrap();
    let variables = text.lines().filter_map(|line| line.split_once('='));
    variables
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

#[test]
fn client_of_busybox_gets_the_lease() {
    // The lease, and the variables of the client's script.
    let cases: [(Lease, &[(&str, &str)]); 2] = [
        (
            bridge_lease(),
            &[
                ("ip", "10.1.0.5"),
                ("mask", "24"),
                ("router", "10.1.0.1"),
                ("serverid", "10.1.0.1"),
                ("lease", "4294967295"),
                ("dns", "10.96.0.10 192.0.2.53"),
                ("domain", "default.svc.cluster.local"),
                (
                    "search",
                    "default.svc.cluster.local svc.cluster.local cluster.local example.org",
                ),
                ("hostname", "web-0"),
                ("mtu", "1450"),
                ("staticroutes", "0.0.0.0/0 10.1.0.1"),
            ],
        ),
        (
            calico_lease(),
            &[
                ("ip", "10.2.3.4"),
                ("mask", "32"),
                ("router", "169.254.1.1"),
                (
                    "staticroutes",
                    "169.254.1.1/32 0.0.0.0 10.8.0.1/32 0.0.0.0 0.0.0.0/0 169.254.1.1 10.8.0.0/16 0.0.0.0 10.9.0.0/17 \
                     10.8.0.1",
                ),
            ],
        ),
    ];
    for (lease, expected) in cases {
        in_new_namespace(move || {
            let variables = run_client(&lease);

            for (name, value) in expected {
                assert_eq!(variables.get(*name).map(String::as_str), Some(*value), "{name}");
            }
        });
    }
}
