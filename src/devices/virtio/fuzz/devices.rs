//! The devices whose requests the event loop handles: entropy source, console, balloon, memory, named port. And the
//! file system, which asks another process to handle them.

use std::{
    io::{ErrorKind, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::Arc,
};

use arbitrary::{Result, Unstructured};
use vmm_sys_util::eventfd::EventFd;

use super::{
    driver::{Driver, Subject},
    guest::{PLUGGABLE, Request, grown_memory, sizes},
};
use crate::{
    control::MAX_CONSOLE_TAIL,
    devices::{
        console_tail::ConsoleTail,
        stall_timer::StallTimer,
        virtio::{
            balloon::Balloon,
            console::Console,
            device::{SharedDevice, serve_or_reset},
            fs::Fs,
            mem::{BLOCK_SIZE, Mem},
            named_port::NamedPort,
            rng::Rng,
        },
    },
};

/// The first byte of an input for the file system.
const FILE_SYSTEM: u8 = u8::MAX;

/// The maximum number of bytes that the host writes to a port at once.
const MAX_HOST_WRITE: usize = 300;

/// Interprets `data`, whose first byte selects a device, as actions of a driver and of the host.
///
/// # Panics
///
/// If a device breaks its contract: the console keeps more than `MAX_CONSOLE_TAIL` bytes, the guest plugs more memory
/// than was requested, or a message to the file server is malformed.
pub fn serve_devices(data: &[u8]) {
    let Some((selection, data)) = data.split_first() else {
        return;
    };
    let input = &mut Unstructured::new(data);
    if *selection == FILE_SYSTEM {
        return run_file_system(input);
    }
    match selection % 6 {
        0 => run(input, Rng::default(), |rng| RngSubject { rng }),
        1 => {
            let tail = Arc::new(ConsoleTail::default());
            run(input, Console::new(tail.clone()), |console| ConsoleSubject {
                console,
                tail,
            });
        }
        kind @ (2 | 3) => run(input, Balloon::new(kind == 3), |balloon| BalloonSubject { balloon }),
        4 => run(input, Mem::new(PLUGGABLE), |mem| MemSubject { mem, requested: 0 }),
        _ => run_port(input),
    }
}

fn run<D, S>(input: &mut Unstructured<'_>, device: D, subject: impl FnOnce(SharedDevice<D>) -> S)
where
    D: crate::devices::virtio::device::Device + 'static,
    S: Subject,
{
    let device = SharedDevice::new(device);
    let kicks = Driver::kicks(&device);
    Driver::new(Box::new(device.clone()), kicks).run(input, &mut subject(device));
}

struct RngSubject {
    rng: SharedDevice<Rng>,
}

impl Subject for RngSubject {
    fn request(&mut self, input: &mut Unstructured<'_>, _queue: usize) -> Result<Request> {
        Ok(Request {
            readable: Vec::new(),
            writable: sizes(input)?,
        })
    }

    fn serve(&mut self, _queue: usize) {
        serve_or_reset(&mut *self.rng.lock(), Rng::serve);
    }

    fn act_on_host(&mut self, _input: &mut Unstructured<'_>) -> Result<()> {
        Ok(())
    }
}

struct ConsoleSubject {
    console: SharedDevice<Console>,
    tail: Arc<ConsoleTail>,
}

impl Subject for ConsoleSubject {
    fn request(&mut self, input: &mut Unstructured<'_>, _queue: usize) -> Result<Request> {
        let count = input.int_in_range(0..=2000_usize)?;
        Ok(Request {
            readable: vec![b'x'; count],
            writable: Vec::new(),
        })
    }

    fn serve(&mut self, _queue: usize) {
        serve_or_reset(&mut *self.console.lock(), Console::serve);
    }

    fn act_on_host(&mut self, _input: &mut Unstructured<'_>) -> Result<()> {
        assert!(self.tail.to_vec().len() <= MAX_CONSOLE_TAIL);
        Ok(())
    }
}

struct BalloonSubject {
    balloon: SharedDevice<Balloon>,
}

impl Subject for BalloonSubject {
    fn request(&mut self, input: &mut Unstructured<'_>, _queue: usize) -> Result<Request> {
        if input.arbitrary()? {
            return Ok(Request {
                readable: Vec::new(),
                writable: sizes(input)?,
            });
        }
        let mut readable = Vec::new();
        for _ in 0..input.int_in_range(0..=70_u8)? {
            readable.extend(u16::from(input.arbitrary::<u8>()? & 0xf).to_le_bytes());
            readable.extend(input.arbitrary::<u64>()?.to_le_bytes());
        }
        Ok(Request {
            readable,
            writable: Vec::new(),
        })
    }

    fn serve(&mut self, queue: usize) {
        let mut balloon = self.balloon.lock();
        if queue == 2 {
            serve_or_reset(&mut *balloon, |balloon| balloon.serve_statistics().map(drop));
        }
        serve_or_reset(&mut *balloon, Balloon::serve);
    }

    fn act_on_host(&mut self, _input: &mut Unstructured<'_>) -> Result<()> {
        serve_or_reset(&mut *self.balloon.lock(), |balloon| {
            balloon.request_statistics().map(drop)
        });
        Ok(())
    }
}

struct MemSubject {
    mem: SharedDevice<Mem>,
    /// The largest size that was requested.
    requested: u64,
}

impl Subject for MemSubject {
    fn request(&mut self, input: &mut Unstructured<'_>, _queue: usize) -> Result<Request> {
        let kind = u64::from(input.int_in_range(0..=4_u8)?);
        let block = input.int_in_range(0..=5_u64)?;
        let address = if input.ratio(7_u8, 8)? {
            PLUGGABLE.start + block * BLOCK_SIZE
        } else {
            input.arbitrary()?
        };
        let count = if input.ratio(7_u8, 8)? {
            input.int_in_range(0..=5_u64)?
        } else {
            input.arbitrary()?
        };
        let length = if input.ratio(7_u8, 8)? {
            24
        } else {
            input.int_in_range(0..=30)?
        };
        let mut readable = [kind, address, count].map(u64::to_le_bytes).concat();
        readable.resize(length, 0);
        Ok(Request {
            readable,
            writable: vec![10],
        })
    }

    fn serve(&mut self, _queue: usize) {
        serve_or_reset(&mut *self.mem.lock(), Mem::serve);
    }

    fn act_on_host(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let usable = input.int_in_range(0..=4_u64)?;
        let size = input.int_in_range(0..=usable)?;
        self.mem.lock().request_size(size * BLOCK_SIZE, usable * BLOCK_SIZE);
        self.requested = self.requested.max(size * BLOCK_SIZE);
        Ok(())
    }

    fn check(&mut self, _driver: &Driver) {
        let plugged = self.mem.lock().plugged_size();
        assert!(plugged <= self.requested, "{plugged} > {}", self.requested);
    }
}

/// A port with the host's end of its socket. Only the absence of panics and endless loops is checked.
struct PortSubject {
    port: SharedDevice<NamedPort>,
    kicks: Vec<EventFd>,
    host: Option<UnixStream>,
}

fn run_port(input: &mut Unstructured<'_>) {
    let (host, socket) = UnixStream::pair().unwrap();
    for end in [&host, &socket] {
        end.set_nonblocking(true).unwrap();
    }
    let timer = Arc::new(StallTimer::new().unwrap());
    let mut port = NamedPort::new("org.test.0", "port", socket.into(), &timer).unwrap();
    let kicks = Driver::kicks(&port);
    let clone = || kicks.iter().map(|kick| kick.try_clone().unwrap()).collect::<Vec<_>>();
    port.watch_kicks(clone()).unwrap();
    let port = SharedDevice::new(port);
    let mut subject = PortSubject {
        port: port.clone(),
        kicks: clone(),
        host: Some(host),
    };
    Driver::new(Box::new(port), kicks).run(input, &mut subject);
}

impl Subject for PortSubject {
    fn request(&mut self, input: &mut Unstructured<'_>, queue: usize) -> Result<Request> {
        Ok(match queue {
            // struct virtio_console_control: port, event, value.
            3 => {
                let port = u32::from(input.int_in_range(0..=2_u8)?).to_le_bytes();
                let event = u16::from(input.int_in_range(0..=8_u8)?).to_le_bytes();
                let value = u16::from(input.int_in_range(0..=2_u8)?).to_le_bytes();
                Request {
                    readable: [&port[..], &event, &value].concat(),
                    writable: Vec::new(),
                }
            }
            2 | 4 => Request {
                readable: Vec::new(),
                writable: sizes(input)?,
            },
            _ => Request {
                readable: vec![b'g'; input.int_in_range(0..=3000_usize)?],
                writable: Vec::new(),
            },
        })
    }

    fn serve(&mut self, queue: usize) {
        // A driver may kick a queue at any time.
        let _ = self.kicks[queue].write(1);
        serve_or_reset(&mut *self.port.lock(), NamedPort::serve);
    }

    fn act_on_host(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        match input.int_in_range(0..=15_u8)? {
            0 => self.host = None,
            1..=7 => {
                let bytes = vec![b'h'; input.int_in_range(0..=MAX_HOST_WRITE)?];
                // A full or closed socket takes nothing.
                if let Some(host) = &mut self.host {
                    let _ = host.write(&bytes);
                }
            }
            _ => {
                let mut bytes = [0; 4096];
                if let Some(host) = &mut self.host
                    && let Ok(count) = host.read(&mut bytes)
                {
                    assert!(count <= bytes.len());
                }
            }
        }
        serve_or_reset(&mut *self.port.lock(), NamedPort::serve);
        let _ = self.port.lock().is_open_in_guest();
        Ok(())
    }
}

/// A file system, whose server has sent its answers before the questions.
struct FileSystemSubject {
    device: SharedDevice<Fs>,
}

fn run_file_system(input: &mut Unstructured<'_>) {
    let (mut server, socket) = UnixStream::pair().unwrap();
    let mut answers = Vec::new();
    for _ in 0..input.int_in_range(0..=5_u8).unwrap_or(0) {
        answers.extend(file_server_answer(input).unwrap_or_default());
    }
    server.write_all(&answers).unwrap();
    // A device that waits for more finds the end of the stream.
    server.shutdown(Shutdown::Write).unwrap();
    let device = SharedDevice::new(Fs::new("tag", socket));
    let kicks = Driver::kicks(&device);
    let mut subject = FileSystemSubject { device: device.clone() };
    Driver::new(Box::new(device), kicks).run(input, &mut subject);

    drop(subject);
    let mut messages = Vec::new();
    match server.read_to_end(&mut messages) {
        Ok(_) => {}
        // The end, if the device has not read all answers.
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
    assert_well_formed(&messages);
}

/// The answer to a question of the frontend: a header with operation, flags and length, and 64 bits.
fn file_server_answer(input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    const GET_FEATURES: u32 = 1;
    const GET_PROTOCOL_FEATURES: u32 = 15;
    const REPLY_FLAG: u32 = 1 << 2;
    let is_damaged = input.ratio(1_u8, 8)?;
    let operation = *input.choose(&[GET_FEATURES, GET_PROTOCOL_FEATURES])?;
    let mut header = [operation, VHOST_USER_VERSION | REPLY_FLAG, 8];
    if is_damaged {
        header[input.int_in_range(0..=2_usize)?] ^= input.arbitrary::<u32>()?;
    }
    let features = if input.ratio(3_u8, 4)? {
        u64::MAX
    } else {
        input.arbitrary()?
    };
    let mut answer = header.map(u32::to_le_bytes).concat();
    answer.extend(features.to_le_bytes());
    if is_damaged {
        answer.truncate(input.int_in_range(0..=answer.len())?);
    }
    Ok(answer)
}

/// The version of the vhost-user protocol, in the lowest two bits of a header's flags.
const VHOST_USER_VERSION: u32 = 1;

/// Asserts that `messages` is a sequence of whole vhost-user messages.
fn assert_well_formed(mut messages: &[u8]) {
    while let Some((header, rest)) = messages.split_first_chunk::<12>() {
        let field = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!(field(4) & 3, VHOST_USER_VERSION);
        let length = usize::try_from(field(8)).unwrap();
        assert!(length <= rest.len(), "{length} of {} bytes", rest.len());
        messages = &rest[length..];
    }
    assert!(messages.is_empty(), "a part of a header: {messages:?}");
}

impl Subject for FileSystemSubject {
    fn request(&mut self, _input: &mut Unstructured<'_>, _queue: usize) -> Result<Request> {
        Ok(Request::default())
    }

    fn serve(&mut self, _queue: usize) {}

    fn act_on_host(&mut self, _input: &mut Unstructured<'_>) -> Result<()> {
        // The server may refuse.
        let _ = self.device.lock().grow(grown_memory());
        Ok(())
    }
}
