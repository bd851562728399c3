//! The queues as a driver sees them, with datagrams in place of a tap device's packets; in [`kernel`]
//! with tap devices.

mod kernel;

use std::{
    os::{fd::OwnedFd, unix::net::UnixDatagram},
    sync::{Arc, atomic::Ordering},
    thread,
    time::{Duration, Instant},
};

use virtio_queue::{
    Queue, QueueT,
    desc::{RawDescriptor, split::Descriptor},
    mock::MockSplitQueue,
};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::{
    control::Control,
    tap::Tap,
    worker::{Pair, Worker},
    *,
};
use crate::devices::virtio::queue::{
    DeviceQueue,
    tests::{Count, NEXT, WRITE, device_queue, memory},
};
use crate::memory::{GuestMemory, MemoryRegions};

const BUFFERS: u64 = 0x1_0000;

/// One end is the device's, the other the network's.
fn link() -> (Arc<Tap>, UnixDatagram) {
    let (device, network) = UnixDatagram::pair().unwrap();
    device.set_nonblocking(true).unwrap();
    network.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    (Arc::new(Tap::new(OwnedFd::from(device))), network)
}

fn descriptor(address: u64, length: u32, flags: u16, next: u16) -> RawDescriptor {
    RawDescriptor::from(Descriptor::new(address, length, flags, next))
}

/// Makes single descriptors available, `lengths` long, one after the other from [`BUFFERS`] on.
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

/// Heads and lengths of what was given back.
fn used(mock: &MockSplitQueue<'_, MemoryRegions>) -> Vec<(u32, u32)> {
    (0..mock.used().idx().load())
        .map(|index| {
            let element = mock.used().ring().ref_at(index.into()).unwrap().load();
            (element.id(), element.len())
        })
        .collect()
}

/// Waits until so many were given back.
fn wait_for_used(mock: &MockSplitQueue<'_, MemoryRegions>, count: u16) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while mock.used().idx().load() < count {
        assert!(Instant::now() < deadline, "{:?}", used(mock));
        thread::yield_now();
    }
}

fn pair<'m>(
    tap: &Arc<Tap>,
    receive: &MockSplitQueue<'m, MemoryRegions>,
    transmit: &MockSplitQueue<'m, MemoryRegions>,
    memory: &GuestMemory,
) -> Pair {
    Pair {
        tap: tap.clone(),
        receive: device_queue(receive, memory).0,
        transmit: device_queue(transmit, memory).0,
        merges: true,
    }
}

/// Whether no worker and no control queue has the tap device any more.
fn tap_is_free(tap: &Arc<Tap>) -> bool {
    Arc::strong_count(tap) == 1
}

/// Waits until a worker has ended by itself.
fn wait_for_end(tap: &Arc<Tap>) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !tap_is_free(tap) {
        assert!(Instant::now() < deadline, "the worker goes on");
        thread::yield_now();
    }
}

#[test]
fn large_packet_takes_several_buffers_and_says_how_many() {
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
fn packet_waits_for_room() {
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

#[test]
fn packets_of_the_guest_go_out_and_malformed_ones_are_given_back() {
    let memory = memory();
    let receive = MockSplitQueue::new(&*memory, 16);
    let transmit = MockSplitQueue::create(&*memory, GuestAddress(0x8000), 16);
    let (tap, network) = link();
    memory.write_slice(&[5; 200], GuestAddress(BUFFERS)).unwrap();
    // Too short for the header, too long, an ordinary one, and one with a part to write to.
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
fn queues_that_the_guest_breaks_end_the_worker_and_nothing_else() {
    let cases = [
        ("a buffer below the header", true, descriptor(BUFFERS, 11, WRITE, 0)),
        ("nothing to write to", true, descriptor(BUFFERS, 64, 0, 0)),
        ("room without an end", true, descriptor(BUFFERS, 64, WRITE | NEXT, 0)),
        ("room that is no memory", true, descriptor(1 << 40, 64, WRITE, 0)),
        ("a packet without an end", false, descriptor(BUFFERS, 64, NEXT, 0)),
        ("a packet that is no memory", false, descriptor(1 << 40, 64, 0, 0)),
    ];
    for (what, to_guest, broken) in cases {
        let memory = memory();
        let receive = MockSplitQueue::new(&*memory, 16);
        let transmit = MockSplitQueue::create(&*memory, GuestAddress(0x8000), 16);
        let (tap, network) = link();
        let queue = if to_guest { &receive } else { &transmit };
        queue.desc_table().store(0, broken).unwrap();
        queue.avail().ring().ref_at(0).unwrap().store(0);
        queue.avail().idx().store(1);
        network.send(&[1; 64]).unwrap();

        let worker = Worker::start(pair(&tap, &receive, &transmit, &memory), None).unwrap();
        wait_for_end(&tap);
        drop(worker);

        assert_eq!(used(queue), [], "{what}");
    }
}

#[test]
fn control_queue_refuses_what_it_does_not_know() {
    let cases: [(&str, &[u8], u8); 7] = [
        ("one pair", &[4, 0, 1, 0], 0),
        ("no pair", &[4, 0, 0, 0], 1),
        ("more than there are", &[4, 0, 2, 0], 1),
        ("unknown command", &[4, 9, 1, 0], 1),
        ("unknown class", &[9, 0, 1, 0], 1),
        ("too short", &[4, 0, 1], 1),
        ("too long", &[4, 0, 1, 0, 0], 1),
    ];
    for (what, command, answer) in cases {
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
        let mut control = Control::new(device_queue(&mock, &memory).0, vec![link().0]);

        while control.serve().unwrap() {}

        assert_eq!(used(&mock), [(0, 1)], "{what}");
        assert_eq!(
            memory.read_obj::<u8>(GuestAddress(BUFFERS + 100)).unwrap(),
            answer,
            "{what}"
        );
    }
}

#[test]
fn device_needs_a_tap_device() {
    let none = Net::new([2, 0, 0, 0, 0, 1], 1500, Vec::new());
    let other = Net::new([2, 0, 0, 0, 0, 1], 1500, vec![UnixDatagram::pair().unwrap().0.into()]);

    assert!(none.is_err());
    assert!(other.is_err());
}

#[test]
fn packets_that_go_out_together_interrupt_the_guest_once_a_turn() {
    let memory = memory();
    let receive = MockSplitQueue::new(&*memory, 16);
    let transmit = MockSplitQueue::create(&*memory, GuestAddress(0x8000), 256);
    let (tap, _network) = link();
    // Two turns of 64.
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
fn control_queue_without_an_end_does_not_keep_a_worker_from_its_stop() {
    let memory = memory();
    let receive = MockSplitQueue::new(&*memory, 16);
    let transmit = MockSplitQueue::create(&*memory, GuestAddress(0x4000), 16);
    let (tap, _network) = link();
    // Not a mock's, whose rings overlap.
    let (table, available, answers) = (0x8000_u64, 0x9000_u64, 0xa000_u64);
    memory
        .write_obj(descriptor(BUFFERS, 4, 0, 0), GuestAddress(table))
        .unwrap();
    let mut queue = Queue::new(256).unwrap();
    queue.set_size(256);
    queue.try_set_desc_table_address(GuestAddress(table)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(available)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(answers)).unwrap();
    queue.set_ready(true);
    let kick = EventFd::new(0).unwrap();
    let kicks = kick.try_clone().unwrap();
    let queue = DeviceQueue::new(0, queue, kick, memory.clone(), Arc::new(Count::default()));
    let control = Control::new(queue, vec![tap.clone()]);
    // One command, again and again, as fast as the device answers.
    let command = || {
        let answered: u16 = memory.read_obj(GuestAddress(answers + 2)).unwrap();
        let wanted = answered.wrapping_add(200);
        memory.write_obj(wanted, GuestAddress(available + 2)).unwrap();
        // It may have caught up meanwhile.
        kicks.write(1).unwrap();
        answered
    };

    let worker = Worker::start(pair(&tap, &receive, &transmit, &memory), Some(control)).unwrap();
    while command() < 1000 {
        assert!(!tap_is_free(&tap), "the worker has ended");
    }
    let stopped = thread::spawn(|| drop(worker));
    let deadline = Instant::now() + Duration::from_secs(10);
    while !stopped.is_finished() {
        assert!(Instant::now() < deadline, "the worker does not stop");
        command();
    }
}
