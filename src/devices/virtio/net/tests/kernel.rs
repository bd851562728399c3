//! Tests with real tap devices, each in a new network namespace.

use std::{
    fs,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::thread::JoinHandleExt,
    },
    process::Command,
    thread,
    time::{Duration, Instant},
};

use nix::{
    fcntl::{OFlag, open},
    libc,
    net::if_::if_nametoindex,
    sched::{CloneFlags, unshare},
    sys::stat::Mode,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::*;
use crate::devices::virtio::net::dhcp::tests::{bridge_lease, client::discover_frame};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// An EtherType for local experiments (IEEE 802), which the kernel does not handle.
const ETHERTYPE: u16 = 0x88b5;
const IPV4: u16 = 0x0800;

/// The addresses of the queues.
const QUEUES: [u64; 4] = [0, 0x4000, 0x8000, 0xc000];

/// The address of the buffers of all queues.
const QUEUE_BUFFERS: u64 = 0x2_0000;

/// Runs `test` in a new network namespace without IPv6, so that the kernel sends no unsolicited packets.
pub(crate) fn in_new_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let _ = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// The queues of a new tap device that is up, with the settings of the shim.
pub(crate) fn create_tap(count: usize) -> Vec<OwnedFd> {
    // SAFETY: all zeroes is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (target, byte) in request.ifr_name.iter_mut().zip(b"tap0") {
        *target = byte.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
    request.ifr_ifru.ifru_flags = flags.try_into().unwrap();
    let header_size: libc::c_int = worker::HEADER_SIZE.try_into().unwrap();
    let queues = (0..count).map(|_| {
        let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let queue = open("/dev/net/tun", flags, Mode::empty()).unwrap();
        // SAFETY: TUNSETIFF reads and writes one `ifreq`, TUNSETVNETHDRSZ reads one `int`.
        let results = unsafe {
            [
                libc::ioctl(queue.as_raw_fd(), libc::TUNSETIFF as libc::Ioctl, &raw mut request),
                libc::ioctl(
                    queue.as_raw_fd(),
                    libc::TUNSETVNETHDRSZ as libc::Ioctl,
                    &raw const header_size,
                ),
            ]
        };
        assert_eq!(results, [0, 0], "{}", io::Error::last_os_error());
        queue
    });
    let queues = queues.collect();
    ip("link set tap0 up");
    queues
}

/// Runs the program `ip`.
fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

/// A packet socket on the host's side of the tap device: it sends frames to the guest and receives the guest's frames.
fn packet_socket(ethertype: u16) -> OwnedFd {
    let protocol = ethertype.to_be();
    // SAFETY: the pointers are valid for the given lengths, `sockaddr_ll` may be all zeroes, and the descriptor is new.
    unsafe {
        let socket = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol.into());
        assert!(socket >= 0, "{}", io::Error::last_os_error());
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET.try_into().unwrap();
        address.sll_protocol = protocol;
        address.sll_ifindex = if_nametoindex("tap0").unwrap().cast_signed();
        let length = size_of_val(&address).try_into().unwrap();
        let bound = libc::bind(socket, (&raw const address).cast(), length);
        assert_eq!(bound, 0, "{}", io::Error::last_os_error());
        let timeout = libc::timeval { tv_sec: 10, tv_usec: 0 };
        let length = size_of_val(&timeout).try_into().unwrap();
        libc::setsockopt(
            socket,
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            (&raw const timeout).cast(),
            length,
        );
        OwnedFd::from_raw_fd(socket)
    }
}

/// An Ethernet frame to the guest.
fn frame(ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = MAC.to_vec();
    frame.extend([2, 0, 0, 0, 0, 2]);
    frame.extend(ethertype.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A frame with a UDP datagram from `port`.
fn udp_frame(port: u16) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
    packet.extend(port.to_be_bytes());
    packet.extend([0, 9, 0, 8, 0, 0]);
    frame(IPV4, &packet)
}

/// The driver's side of the queues.
fn mocks(memory: &MemoryRegions, count: usize) -> Vec<MockSplitQueue<'_, MemoryRegions>> {
    QUEUES[..count]
        .iter()
        .map(|address| MockSplitQueue::create(memory, GuestAddress(*address), 256))
        .collect()
}

/// Activates the device for a driver that accepts `features`, or all offered ones. Returns the kick of each queue.
fn activate(
    net: &mut Net,
    features: Option<u64>,
    mocks: &[MockSplitQueue<'_, MemoryRegions>],
    memory: &GuestMemory,
) -> Vec<EventFd> {
    let queues: Vec<_> = mocks.iter().map(|mock| device_queue(mock, memory).0).collect();
    let kicks = queues.iter().map(|queue| queue.kick().try_clone().unwrap()).collect();
    let activation = Activation {
        memory: memory.clone(),
        features: features.unwrap_or(net.features()),
        queues,
        interrupt: Arc::new(InterruptCounter::default()),
    };
    net.activate(activation).unwrap();
    kicks
}

/// Makes `count` more chains of a single descriptor available, each with a separate buffer. At most 128 in total, since
/// the mock's used ring overlaps the rest of its available ring.
fn offer_more(mock: &MockSplitQueue<'_, MemoryRegions>, count: u16, length: u32, flags: u16) {
    let start = mock.avail().idx().load();
    for index in start..start + count {
        let address = QUEUE_BUFFERS + u64::from(index) * u64::from(length);
        let entry = descriptor(address, length, flags, 0);
        mock.desc_table().store(index, entry).unwrap();
        mock.avail().ring().ref_at(index.into()).unwrap().store(index);
    }
    mock.avail().idx().store(start + count);
}

/// Waits until the worker uses no CPU time: it is blocked.
fn wait_until_blocked(net: &Net) {
    let thread = net.workers[0].thread.as_ref().unwrap();
    let cpu_time = || {
        let mut clock = 0;
        // SAFETY: all zeroes is a valid `timespec`.
        let mut time: libc::timespec = unsafe { std::mem::zeroed() };
        // SAFETY: the thread is not joined yet, and each call fills one value.
        let results = unsafe {
            [
                libc::pthread_getcpuclockid(thread.as_pthread_t(), &raw mut clock),
                libc::clock_gettime(clock, &raw mut time),
            ]
        };
        assert_eq!(results, [0, 0]);
        (time.tv_sec, time.tv_nsec)
    };
    let deadline = Instant::now() + Duration::from_secs(5);
    let mut before = cpu_time();
    loop {
        assert!(Instant::now() < deadline, "the worker spins");
        // There is no event for a thread that became idle.
        thread::sleep(Duration::from_millis(100));
        let now = cpu_time();
        if now == before {
            return;
        }
        before = now;
    }
}

#[test]
fn configuration_is_reported_and_multiqueue_is_offered_only_with_several_pairs() {
    in_new_namespace(|| {
        for pairs in [1, 2] {
            let net = Net::new("net-0".to_owned(), MAC, 1450, create_tap(pairs), &stall_timer()).unwrap();
            let mut config = [0xff; 14];
            net.read_config(0, &mut config);
            let mut mtu = [0xff; 2];
            net.read_config(10, &mut mtu);
            let mut beyond = [0xff; 4];
            net.read_config(u64::MAX, &mut beyond);
            let low = u8::try_from(pairs).unwrap();
            let multiqueue = 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ;

            assert_eq!(config, [2, 0, 0, 0, 0, 1, 1, 0, low, 0, 0xaa, 0x05, 0, 0]);
            assert_eq!(u16::from_le_bytes(mtu), 1450);
            assert_eq!(beyond, [0; 4]);
            assert_eq!(net.features() & multiqueue, if pairs > 1 { multiqueue } else { 0 });
            assert_eq!(net.queue_sizes().len(), if pairs > 1 { 5 } else { 2 });
        }
    });
}

#[test]
fn frames_pass_between_guest_and_kernel_before_and_after_a_reset() {
    in_new_namespace(|| {
        let memory = memory();
        let mut net = Net::new("net-0".to_owned(), MAC, 1500, create_tap(1), &stall_timer()).unwrap();
        let host = packet_socket(ETHERTYPE);
        for number in [1, 2] {
            let mocks = mocks(&memory, 2);
            offer_more(&mocks[0], 64, 2048, WRITE);
            let kicks = activate(&mut net, None, &mocks, &memory);

            let sent = frame(ETHERTYPE, &[number; 100]);
            rustix::io::write(&host, &sent).unwrap();
            wait_for_used(&mocks[0], 1);
            let mut arrived = vec![0; sent.len()];
            let start = GuestAddress(QUEUE_BUFFERS + worker::HEADER_SIZE as u64);
            memory.read_slice(&mut arrived, start).unwrap();
            assert_eq!(arrived, sent);
            let num_buffers: u16 = memory.read_obj(GuestAddress(QUEUE_BUFFERS + 10)).unwrap();
            assert_eq!(num_buffers, 1);

            let mut packet = vec![0; worker::HEADER_SIZE];
            packet.extend(frame(ETHERTYPE, &[number + 100; 80]));
            memory.write_slice(&packet, GuestAddress(BUFFERS)).unwrap();
            offer(&mocks[1], &[packet.len().try_into().unwrap()], 0);
            kicks[1].write(1).unwrap();
            let mut received = [0; 2000];
            let length = rustix::io::read(&host, &mut received).unwrap();
            assert_eq!(received[..length], packet[worker::HEADER_SIZE..]);

            net.reset();

            // No thread is left that could access a queue.
            assert_eq!(Arc::strong_count(&net.tap_queues[0]), 1);
        }
    });
}

#[test]
fn worker_of_a_removed_tap_device_sleeps_and_drops_transmitted_packets() {
    for (what, buffers) in [("with receive buffers", 64), ("without receive buffers", 0)] {
        in_new_namespace(move || {
            let log = LogCapture::start(what);
            let memory = memory();
            let mut net = Net::new(what.to_owned(), MAC, 1500, create_tap(1), &stall_timer()).unwrap();
            let mocks = mocks(&memory, 2);
            offer_more(&mocks[0], buffers, 2048, WRITE);
            let kicks = activate(&mut net, None, &mocks, &memory);

            ip("link del tap0");
            offer_more(&mocks[1], 3, 100, 0);
            kicks[1].write(1).unwrap();
            wait_for_used(&mocks[1], 3);

            wait_until_blocked(&net);
            net.reset();
            assert_eq!(used(&mocks[0]), [], "{what}");
            let lines = log.lines();
            let gone = "queue 0: the tap device is gone, the guest has no network on this interface";
            assert!(lines.iter().any(|line| line == gone), "{what}: {lines:?}");
            let dropped = "queue 0: a packet of the guest is dropped: cannot write to the tap device: ";
            assert_eq!(
                lines.iter().filter(|line| line.starts_with(dropped)).count(),
                3,
                "{lines:?}"
            );
        });
    }
}

#[test]
fn driver_may_accept_any_single_offered_offload() {
    in_new_namespace(|| {
        let memory = memory();
        let mut net = Net::new("net-0".to_owned(), MAC, 1500, create_tap(1), &stall_timer()).unwrap();
        let checksum = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_NET_F_GUEST_CSUM;
        for offload in [
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_USO4,
            VIRTIO_NET_F_GUEST_USO6,
        ] {
            let features = (checksum | 1 << offload) & net.features();
            activate(&mut net, Some(features), &mocks(&memory, 2), &memory);
            net.reset();
        }
    });
}

#[test]
fn second_pair_receives_packets_after_the_driver_enables_it() {
    const FLOWS: u16 = 32;
    in_new_namespace(|| {
        let memory = memory();
        let mut net = Net::new("net-0".to_owned(), MAC, 1500, create_tap(2), &stall_timer()).unwrap();
        let host = packet_socket(IPV4);
        let mut mocks = mocks(&memory, 4);
        mocks.push(MockSplitQueue::create(&*memory, GuestAddress(BUFFERS), 16));
        offer_more(&mocks[0], 128, 4096, WRITE);
        offer_more(&mocks[2], 128, 4096, WRITE);
        let kicks = activate(&mut net, None, &mocks, &memory);
        let send = || {
            for port in 1000..1000 + FLOWS {
                rustix::io::write(&host, &udp_frame(port)).unwrap();
            }
        };

        send();
        wait_for_used(&mocks[0], FLOWS);
        assert_eq!(used(&mocks[2]), []);

        // VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET with 2 pairs, and a byte for the acknowledgement.
        let command = GuestAddress(0x1_8000);
        memory.write_slice(&[4, 0, 2, 0, 0xff], command).unwrap();
        let table = mocks[4].desc_table();
        table.store(0, descriptor(command.0, 4, NEXT, 1)).unwrap();
        table.store(1, descriptor(command.0 + 4, 1, WRITE, 0)).unwrap();
        mocks[4].avail().ring().ref_at(0).unwrap().store(0);
        mocks[4].avail().idx().store(1);
        kicks[4].write(1).unwrap();
        wait_for_used(&mocks[4], 1);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(command.0 + 4)).unwrap(), 0);
        send();
        let received = || (mocks[0].used().idx().load() - FLOWS, mocks[2].used().idx().load());
        let deadline = Instant::now() + Duration::from_secs(10);
        while received().0 + received().1 < FLOWS {
            assert!(Instant::now() < deadline, "{:?}", received());
            thread::yield_now();
        }

        let (first, second) = received();
        assert_eq!(first + second, FLOWS);
        assert!(first > 0 && second > 0, "{first} and {second}");
        net.reset();
    });
}

#[test]
fn kernel_sees_no_dhcp_request_of_a_link_with_a_lease() {
    in_new_namespace(|| {
        let memory = memory();
        let mut net = Net::new("net-0".to_owned(), MAC, 1500, create_tap(1), &stall_timer()).unwrap();
        net.serve_lease(&bridge_lease());
        let host = packet_socket(IPV4);
        let mocks = mocks(&memory, 2);
        offer_more(&mocks[0], 64, 2048, WRITE);
        let kicks = activate(&mut net, None, &mocks, &memory);
        let frames = [discover_frame(), udp_frame(1000)].map(|frame| [&[0; worker::HEADER_SIZE][..], &frame].concat());
        memory.write_slice(&frames.concat(), GuestAddress(BUFFERS)).unwrap();

        offer(
            &mocks[1],
            &frames.each_ref().map(|frame| frame.len().try_into().unwrap()),
            0,
        );
        kicks[1].write(1).unwrap();

        let mut received = [0; 2000];
        let length = rustix::io::read(&host, &mut received).unwrap();
        assert_eq!(received[..length], udp_frame(1000));
        wait_for_used(&mocks[0], 1);
        let mut ports = [0; 4];
        let start = GuestAddress(QUEUE_BUFFERS + worker::HEADER_SIZE as u64 + 34);
        memory.read_slice(&mut ports, start).unwrap();
        assert_eq!(ports, [0, 67, 0, 68]);
        net.reset();
    });
}
