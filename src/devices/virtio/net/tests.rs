//! Tests of the queues as a driver sees them. A datagram socket takes the place of the tap device; [`kernel`] has the
//! tests with real tap devices, [`dhcp`] those with a lease.

mod dhcp;
pub(crate) mod kernel;

use std::{
    os::{fd::OwnedFd, unix::net::UnixDatagram},
    sync::{Arc, atomic::Ordering},
    thread,
    time::{Duration, Instant},
};

use virtio_queue::{Queue, QueueT, mock::MockSplitQueue};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::{
    control::ControlQueue,
    tap::TapQueue,
    worker::{QueuePair, Worker},
    *,
};
use crate::{
    devices::{
        log_capture::LogCapture,
        virtio::{
            mock::{InterruptCounter, NEXT, WRITE, descriptor, device_queue, memory, stall_timer},
            queue::DeviceQueue,
        },
    },
    memory::{GuestMemory, MemoryRegions},
};

/// The address of the buffers that tests make available.
const BUFFERS: u64 = 0x1_0000;

/// The device's end and the network's end of a link.
fn link() -> (Arc<TapQueue>, UnixDatagram) {
    let (device, network) = UnixDatagram::pair().unwrap();
    device.set_nonblocking(true).unwrap();
    network.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    (Arc::new(TapQueue::new(OwnedFd::from(device))), network)
}

/// Makes one chain per length available, each of a single descriptor. The buffers are contiguous, from [`BUFFERS`] on.
fn offer(mock: &MockSplitQueue<'_, MemoryRegions>, lengths: &[u32], flags: u16) {
    let mut address = BUFFERS;
    for (index, length) in (0..).zip(lengths) {
        mock.desc_table()
            .store(index, descriptor(address, *length, flags, 0))
            .unwrap();
        mock.avail().ring().ref_at(index.into()).unwrap().store(index);
        address += u64::from(*length);
    }
    mock.avail().idx().store(u16::try_from(lengths.len()).unwrap());
}

/// Head and written length of all used chains.
fn used(mock: &MockSplitQueue<'_, MemoryRegions>) -> Vec<(u32, u32)> {
    (0..mock.used().idx().load())
        .map(|index| {
            let element = mock.used().ring().ref_at(index.into()).unwrap().load();
            (element.id(), element.len())
        })
        .collect()
}

/// Waits until `count` chains are used.
fn wait_for_used(mock: &MockSplitQueue<'_, MemoryRegions>, count: u16) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while mock.used().idx().load() < count {
        assert!(Instant::now() < deadline, "{:?}", used(mock));
        thread::yield_now();
    }
}

fn pair<'m>(
    tap: &Arc<TapQueue>,
    receive: &MockSplitQueue<'m, MemoryRegions>,
    transmit: &MockSplitQueue<'m, MemoryRegions>,
    memory: &GuestMemory,
) -> QueuePair {
    QueuePair {
        tap: tap.clone(),
        receive: device_queue(receive, memory).0,
        transmit: device_queue(transmit, memory).0,
        mergeable_buffers: true,
        dhcp: None,
        counters: Counters::with_queues("net-test", 2, &stall_timer()),
    }
}

/// Whether no worker and no control queue holds the tap device.
fn is_tap_released(tap: &Arc<TapQueue>) -> bool {
    Arc::strong_count(tap) == 1
}

/// Waits until the worker ends without being stopped.
fn wait_for_end(tap: &Arc<TapQueue>) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !is_tap_released(tap) {
        assert!(Instant::now() < deadline, "the worker is still running");
        thread::yield_now();
    }
}

#[test]
fn large_packet_spans_several_buffers_and_reports_their_number() {
    let memory = memory();
    let receive = MockSplitQueue::new(&*memory, 16);
    let transmit = MockSplitQueue::create(&*memory, GuestAddress(0x8000), 16);
    let (tap, network) = link();
    offer(&receive, &[20_000, 20_000, 20_000, 20_000, 70_000], WRITE);
    let packet: Vec<u8> = (0..50_000_u32).map(|byte| (byte % 251) as u8).collect();
    network.send(&packet).unwrap();
    network.send(&packet[..100]).unwrap();

    let worker = Worker::start(pair(&tap, &receive, &transmit, &memory), None).unwrap();
    wait_for_used(&receive, 4);
    drop(worker);

    assert_eq!(used(&receive), [(0, 20_000), (1, 20_000), (2, 10_000), (3, 100)]);
    let mut arrived = vec![0; packet.len()];
    memory.read_slice(&mut arrived, GuestAddress(BUFFERS)).unwrap();
    let mut expected = packet.clone();
    expected[10..12].copy_from_slice(&3_u16.to_le_bytes());
    assert_eq!(arrived, expected);
    let mut small = vec![0; 100];
    memory.read_slice(&mut small, GuestAddress(BUFFERS + 60_000)).unwrap();
    expected[10..12].copy_from_slice(&1_u16.to_le_bytes());
    assert_eq!(small, expected[..100]);
}

#[test]
fn packet_waits_until_the_guest_provides_buffers() {
    let memory = memory();
    let receive = MockSplitQueue::new(&*memory, 16);
    let transmit = MockSplitQueue::create(&*memory, GuestAddress(0x8000), 16);
    let (tap, network) = link();
    network.send(&[7; 64]).unwrap();
    let pair = pair(&tap, &receive, &transmit, &memory);
    let kick = pair.receive.kick().try_clone().unwrap();
    let worker = Worker::start(pair, None).unwrap();

    offer(&receive, &[70_000], WRITE);
    kick.write(1).unwrap();
    wait_for_used(&receive, 1);
    drop(worker);

    assert_eq!(used(&receive), [(0, 64)]);
}

/// In another monitor, an interface stayed silent after its guest had once had no buffer. Some rounds refill the queue
/// while the worker still finds it empty, others after it sleeps.
#[test]
fn receiving_continues_whenever_the_guest_provides_buffers_again_cve_2020_16843() {
    const ROUNDS: u16 = 200;
    let memory = memory();
    let receive = MockSplitQueue::new(&*memory, 16);
    let transmit = MockSplitQueue::create(&*memory, GuestAddress(0x8000), 16);
    let (tap, network) = link();
    let pair = pair(&tap, &receive, &transmit, &memory);
    let kick = pair.receive.kick().try_clone().unwrap();
    let counters = pair.counters.clone();
    let worker = Worker::start(pair, None).unwrap();

    for round in 0..ROUNDS {
        // The second packet is one that arrives while the guest has no buffer for the first.
        for _ in 0..2 {
            network.send(&[7; 64]).unwrap();
        }
        if round > 0 && round.is_multiple_of(10) {
            let deadline = Instant::now() + Duration::from_secs(10);
            while counters.pending().is_empty() {
                assert!(Instant::now() < deadline, "the worker does not wait for buffers");
                thread::yield_now();
            }
        }
        for packet in 0..2 {
            let index = 2 * round + packet;
            let slot = index % 16;
            let entry = descriptor(BUFFERS, 70_000, WRITE, 0);
            receive.desc_table().store(slot, entry).unwrap();
            receive.avail().ring().ref_at(slot.into()).unwrap().store(slot);
            receive.avail().idx().store(index + 1);
            kick.write(1).unwrap();
            wait_for_used(&receive, index + 1);
        }
    }
    drop(worker);

    assert_eq!(counters.read().requests, u64::from(2 * ROUNDS));
}

/// In another monitor, the completion of one of the two requests freed the buffer of the other.
#[test]
fn buffer_made_available_twice_receives_two_packets_cve_2026_45782() {
    let memory = memory();
    let receive = MockSplitQueue::new(&*memory, 16);
    let transmit = MockSplitQueue::create(&*memory, GuestAddress(0x8000), 16);
    let (tap, network) = link();
    offer(&receive, &[70_000], WRITE);
    receive.avail().ring().ref_at(1).unwrap().store(0);
    receive.avail().idx().store(2);
    for length in [64, 100] {
        network.send(&[7; 100][..length]).unwrap();
    }

    let worker = Worker::start(pair(&tap, &receive, &transmit, &memory), None).unwrap();
    wait_for_used(&receive, 2);
    drop(worker);

    assert_eq!(used(&receive), [(0, 64), (0, 100)]);
}

#[test]
fn guest_packets_are_sent_and_malformed_ones_are_dropped() {
    let memory = memory();
    let receive = MockSplitQueue::new(&*memory, 16);
    let transmit = MockSplitQueue::create(&*memory, GuestAddress(0x8000), 16);
    let (tap, network) = link();
    memory.write_slice(&[5; 200], GuestAddress(BUFFERS)).unwrap();
    // One shorter than a header, one too long, a valid one, and one with a writable buffer.
    offer(&transmit, &[11, 70_000, 60], 0);
    let table = transmit.desc_table();
    table.store(3, descriptor(BUFFERS, 60, NEXT, 4)).unwrap();
    table.store(4, descriptor(BUFFERS, 60, WRITE, 0)).unwrap();
    transmit.avail().ring().ref_at(3).unwrap().store(3);
    transmit.avail().idx().store(4);
    memory.write_slice(&[9; 60], GuestAddress(BUFFERS + 70_011)).unwrap();

    let worker = Worker::start(pair(&tap, &receive, &transmit, &memory), None).unwrap();
    wait_for_used(&transmit, 4);
    drop(worker);

    assert_eq!(used(&transmit), [(0, 0), (1, 0), (2, 0), (3, 0)]);
    let mut packet = [0; 1000];
    let length = network.recv(&mut packet).unwrap();
    assert_eq!(packet[..length], [9; 60]);
    network.set_nonblocking(true).unwrap();
    assert!(network.recv(&mut packet).is_err());
}

#[test]
fn broken_queue_ends_its_worker() {
    let cases = [
        (
            "receive buffer smaller than the header",
            true,
            descriptor(BUFFERS, 11, WRITE, 0),
        ),
        (
            "receive buffer that is not writable",
            true,
            descriptor(BUFFERS, 64, 0, 0),
        ),
        (
            "unterminated receive chain",
            true,
            descriptor(BUFFERS, 64, WRITE | NEXT, 0),
        ),
        (
            "receive buffer outside of memory",
            true,
            descriptor(1 << 40, 64, WRITE, 0),
        ),
        ("unterminated transmit chain", false, descriptor(BUFFERS, 64, NEXT, 0)),
        (
            "transmit buffer outside of memory",
            false,
            descriptor(1 << 40, 64, 0, 0),
        ),
    ];
    for (what, to_guest, broken) in cases {
        let log = LogCapture::start(what);
        let memory = memory();
        let receive = MockSplitQueue::new(&*memory, 16);
        let transmit = MockSplitQueue::create(&*memory, GuestAddress(0x8000), 16);
        let (tap, network) = link();
        let queue = if to_guest { &receive } else { &transmit };
        queue.desc_table().store(0, broken).unwrap();
        queue.avail().ring().ref_at(0).unwrap().store(0);
        queue.avail().idx().store(1);
        network.send(&[1; 64]).unwrap();

        let mut pair = pair(&tap, &receive, &transmit, &memory);
        pair.counters = Counters::new(what);
        let counters = pair.counters.clone();
        let worker = Worker::start(pair, None).unwrap();
        wait_for_end(&tap);
        drop(worker);

        let lines = log.lines();
        assert_eq!((lines.len(), counters.read().errors), (1, 1), "{what}: {lines:?}");
        let expected = "the guest continues without the queues 0 and 0: queue 0: ";
        assert!(lines[0].starts_with(expected), "{what}: {lines:?}");

        assert_eq!(used(queue), [], "{what}");
    }
}

#[test]
fn control_queue_refuses_unknown_and_malformed_commands() {
    let cases: [(&str, &[u8], u8); 7] = [
        ("one pair", &[4, 0, 1, 0], 0),
        ("no pairs", &[4, 0, 0, 0], 1),
        ("more pairs than exist", &[4, 0, 2, 0], 1),
        ("unknown command", &[4, 9, 1, 0], 1),
        ("unknown class", &[9, 0, 1, 0], 1),
        ("too short", &[4, 0, 1], 1),
        ("too long", &[4, 0, 1, 0, 0], 1),
    ];
    for (what, command, expected) in cases {
        let log = LogCapture::on_this_thread("net-test");
        let memory = memory();
        let mock = MockSplitQueue::new(&*memory, 16);
        memory.write_slice(command, GuestAddress(BUFFERS)).unwrap();
        memory.write_obj(0xff_u8, GuestAddress(BUFFERS + 100)).unwrap();
        let length = u32::try_from(command.len()).unwrap();
        let table = mock.desc_table();
        table.store(0, descriptor(BUFFERS, length, NEXT, 1)).unwrap();
        table.store(1, descriptor(BUFFERS + 100, 1, WRITE, 0)).unwrap();
        mock.avail().ring().ref_at(0).unwrap().store(0);
        mock.avail().idx().store(1);
        let mut control = ControlQueue::new(
            device_queue(&mock, &memory).0,
            vec![link().0],
            Counters::new("net-test"),
        );

        while control.serve().unwrap() {}

        assert_eq!(used(&mock), [(0, 1)], "{what}");
        assert_eq!(log.lines().len(), usize::from(expected), "{what}");
        assert_eq!(
            memory.read_obj::<u8>(GuestAddress(BUFFERS + 100)).unwrap(),
            expected,
            "{what}"
        );
    }
}

#[test]
fn packet_that_the_tap_device_does_not_take_is_logged_with_its_cause_and_counted() {
    let log = LogCapture::start("net-full");
    let memory = memory();
    let receive = MockSplitQueue::new(&*memory, 16);
    let transmit = MockSplitQueue::create(&*memory, GuestAddress(0x8000), 16);
    let (tap, _network) = link();
    // Nothing reads from the network's end: fill the socket.
    while rustix::io::write(&*tap, &[0; 4096]).is_ok() {}
    offer(&transmit, &[100, 5], 0);
    let mut pair = pair(&tap, &receive, &transmit, &memory);
    pair.counters = Counters::new("net-full");
    let counters = pair.counters.clone();

    let worker = Worker::start(pair, None).unwrap();
    wait_for_used(&transmit, 2);
    drop(worker);

    assert_eq!(
        log.lines(),
        [
            "queue 0: a packet of the guest is dropped: cannot write to the tap device: Resource temporarily \
             unavailable (os error 11)",
            "queue 0: a packet of the guest is dropped: it has 5 bytes, outside of 12 to 65562"
        ]
    );
    let counters = counters.read();
    assert_eq!((counters.requests, counters.errors), (0, 2));
}

#[test]
fn packets_that_wait_for_the_guests_buffers_are_pending_until_it_provides_some() {
    let memory = memory();
    let receive = MockSplitQueue::new(&*memory, 16);
    let transmit = MockSplitQueue::create(&*memory, GuestAddress(0x8000), 16);
    let (tap, network) = link();
    let mut pair = pair(&tap, &receive, &transmit, &memory);
    let (counters, kick) = (pair.counters.clone(), pair.receive.kick().try_clone().unwrap());
    pair.mergeable_buffers = false;
    let wait_until = |what: &str, condition: &dyn Fn() -> bool| {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !condition() {
            assert!(Instant::now() < deadline, "{what}: {counters:?}");
            thread::yield_now();
        }
    };
    offer(&receive, &[2000], WRITE);

    let worker = Worker::start(pair, None).unwrap();
    network.send(&[1; 100]).unwrap();
    wait_for_used(&receive, 1);
    assert_eq!(counters.pending(), [], "no packet waits");
    network.send(&[1; 100]).unwrap();
    wait_until("the wait is not noticed", &|| !counters.pending().is_empty());
    assert_eq!(counters.pending()[0].place, "queue 0");

    offer(&receive, &[2000, 2000], WRITE);
    kick.write(1).unwrap();
    wait_for_used(&receive, 2);
    wait_until("the wait does not end", &|| counters.pending().is_empty());
    drop(worker);

    let counters = counters.read();
    assert_eq!(
        (counters.requests, counters.bytes_to_guest, counters.errors),
        (2, 2 * 88, 0)
    );
}

#[test]
fn descriptor_that_is_not_a_tap_device_is_an_error() {
    let no_queue = Net::new("net-0".to_owned(), [2, 0, 0, 0, 0, 1], 1500, Vec::new(), &stall_timer());
    let socket = Net::new(
        "net-0".to_owned(),
        [2, 0, 0, 0, 0, 1],
        1500,
        vec![UnixDatagram::pair().unwrap().0.into()],
        &stall_timer(),
    );

    assert!(no_queue.is_err());
    assert!(socket.is_err());
}

#[test]
fn transmitted_packets_interrupt_the_guest_once_per_turn() {
    let memory = memory();
    let receive = MockSplitQueue::new(&*memory, 16);
    let transmit = MockSplitQueue::create(&*memory, GuestAddress(0x8000), 256);
    let (tap, _network) = link();
    // Two turns of at most 64 packets.
    offer(&transmit, &[60; 100], 0);
    let (queue, interrupts) = device_queue(&transmit, &memory);
    let mut pair = pair(&tap, &receive, &transmit, &memory);
    pair.transmit = queue;

    let worker = Worker::start(pair, None).unwrap();
    wait_for_used(&transmit, 100);
    drop(worker);

    assert_eq!(interrupts.used.load(Ordering::SeqCst), 2);
}

#[test]
fn worker_stops_while_the_guest_keeps_sending_commands() {
    let memory = memory();
    let receive = MockSplitQueue::new(&*memory, 16);
    let transmit = MockSplitQueue::create(&*memory, GuestAddress(0x4000), 16);
    let (tap, _network) = link();
    // Not a mock queue: with 256 entries, the rings of a mock overlap.
    let (table, available_ring, used_ring) = (0x8000_u64, 0x9000_u64, 0xa000_u64);
    memory
        .write_obj(descriptor(BUFFERS, 4, 0, 0), GuestAddress(table))
        .unwrap();
    let mut queue = Queue::new(256).unwrap();
    queue.set_size(256);
    queue.try_set_desc_table_address(GuestAddress(table)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(available_ring)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(used_ring)).unwrap();
    queue.set_ready(true);
    let kick = EventFd::new(0).unwrap();
    let guest_kick = kick.try_clone().unwrap();
    let queue = DeviceQueue::new(0, queue, kick, memory.clone(), Arc::new(InterruptCounter::default()));
    let control = ControlQueue::new(queue, vec![tap.clone()], Counters::new("net-test"));
    // Makes the same command available again, as fast as the device executes it. Returns the used index.
    let send_commands = || {
        let used: u16 = memory.read_obj(GuestAddress(used_ring + 2)).unwrap();
        let available = used.wrapping_add(200);
        memory.write_obj(available, GuestAddress(available_ring + 2)).unwrap();
        // The device may have run out of commands and may wait for a kick.
        guest_kick.write(1).unwrap();
        used
    };

    let worker = Worker::start(pair(&tap, &receive, &transmit, &memory), Some(control)).unwrap();
    while send_commands() < 1000 {
        assert!(!is_tap_released(&tap), "the worker has ended");
    }
    let stopped = thread::spawn(|| drop(worker));
    let deadline = Instant::now() + Duration::from_secs(10);
    while !stopped.is_finished() {
        assert!(Instant::now() < deadline, "the worker does not stop");
        send_commands();
    }
}
