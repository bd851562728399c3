//! Runs in a container and tries to open streams that belong to others: it connects to vsock ports of the host, of the
//! guest itself, and of the loopback device, until it is killed.
//!
//! Prints `scanning` at its start, a line `attempts N` after each round, and a line `stream CID PORT` for each
//! connection that it gets. If the guest's kernel gives containers no vsock sockets, it prints `no sockets` and sleeps.

use std::{
    fs::File,
    io::{Read, Write},
};

const AF_VSOCK: i32 = 40;
const SOCK_STREAM: i32 = 1;

/// `struct sockaddr_vm` (`linux/vm_sockets.h`).
#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    flags: u8,
    zero: [u8; 3],
}

unsafe extern "C" {
    safe fn socket(family: i32, kind: i32, protocol: i32) -> i32;
    fn connect(socket: i32, address: *const Address, length: u32) -> i32;
    safe fn close(descriptor: i32) -> i32;
    safe fn pause() -> i32;
}

const HOST: u32 = 2;

/// The host, the loopback device, and the cid that a machine has.
const CIDS: [u32; 3] = [HOST, 1, 3];

/// The first port of a stream (`MIN_STREAM_PORT` of the protocol).
const FIRST_PORT: u32 = 1024;

/// How many ports of each of two kinds a round tries: the first ones, which a simple allocator would use, and random
/// ones.
const PORTS_PER_ROUND: usize = 256;

fn main() {
    let mut output = std::io::stdout();
    let mut random = File::open("/dev/urandom").expect("open /dev/urandom");
    writeln!(output, "scanning").expect("print");
    let mut attempts = 0_u64;
    loop {
        let mut bytes = [0; 4 * PORTS_PER_ROUND];
        random.read_exact(&mut bytes).expect("read /dev/urandom");
        let random_ports = bytes
            .chunks_exact(4)
            .map(|port| u32::from_ne_bytes(port.try_into().expect("4 bytes")));
        for (index, port) in (FIRST_PORT..).take(PORTS_PER_ROUND).chain(random_ports).enumerate() {
            // The other cids only for a few ports: the kernel may wait for their answer.
            let cids = if index % PORTS_PER_ROUND == 0 {
                &CIDS[..]
            } else {
                &[HOST]
            };
            for &cid in cids {
                let socket = socket(AF_VSOCK, SOCK_STREAM, 0);
                if socket < 0 {
                    writeln!(output, "no sockets: {}", std::io::Error::last_os_error()).expect("print");
                    loop {
                        pause();
                    }
                }
                let address = Address {
                    family: AF_VSOCK as u16,
                    reserved: 0,
                    port,
                    cid,
                    flags: 0,
                    zero: [0; 3],
                };
                // SAFETY: `address` is a `sockaddr_vm` of this length, which the kernel only reads.
                if unsafe { connect(socket, &raw const address, size_of::<Address>() as u32) } == 0 {
                    // Keeps the stream, as a thief would.
                    writeln!(output, "stream {cid} {port}").expect("print");
                } else {
                    close(socket);
                }
                attempts += 1;
            }
        }
        writeln!(output, "attempts {attempts}").expect("print");
    }
}
