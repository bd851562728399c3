//! A guest with a user's kernel, whose init executes the lines that a test writes to its serial console.

use std::{
    env,
    fs::File,
    io::{PipeReader, PipeWriter, Read, Write, pipe},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nutshell_protocol::disk_serial;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{OFlags, fcntl_setfl},
};

use crate::{
    control::{
        Channel, Command, DiskAccess, DiskConfig, EndReason, Extent, LinkConfig, MachineConfig, Notice, Software,
    },
    devices::console_tail::ConsoleTail,
    vmm,
};

/// How long a boot or a command in the guest may take: the lab emulates processors.
const GUEST_TIMEOUT: Duration = Duration::from_secs(180);

pub(super) const VCPUS: u8 = 4;

/// The subfolders of `NUTSHELL_TEST_KERNELS`, one for each kernel, each with the files `kernel` and `initramfs`.
pub(super) fn kernels() -> Vec<PathBuf> {
    let folder = env::var_os("NUTSHELL_TEST_KERNELS")
        .expect("set NUTSHELL_TEST_KERNELS to the folder that tests/pc/kernels prints");
    let mut kernels: Vec<_> = Path::new(&folder)
        .read_dir()
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    kernels.sort();
    assert!(!kernels.is_empty(), "there is no kernel in {folder:?}");
    kernels
}

/// The release of a kernel, as `uname -r` prints it.
pub(super) fn release(kernel: &Path) -> String {
    kernel.file_name().unwrap().to_string_lossy().into_owned()
}

/// A running guest.
pub(super) struct Guest {
    channel: Channel,
    input: PipeWriter,
    output: PipeReader,
    console: String,
    /// The host's end of the port of the guest agent.
    pub(super) agent_port: UnixStream,
    machine: JoinHandle<()>,
}

impl Guest {
    /// Boots `kernel` with these disks and with these links, each with the queue of its tap device, and waits until it
    /// executes commands.
    pub(super) fn boot(kernel: &Path, disks: Vec<File>, links: Vec<(LinkConfig, OwnedFd)>) -> Self {
        let (links, queues): (Vec<_>, Vec<_>) = links.into_iter().unzip();
        let (input_end, input) = pipe().unwrap();
        let (output, output_end) = pipe().unwrap();
        for end in [input_end.as_fd(), output_end.as_fd()] {
            fcntl_setfl(end, OFlags::NONBLOCK).unwrap();
        }
        let open = |name| File::open(kernel.join(name)).unwrap();
        let (kernel_file, initramfs) = (open("kernel"), open("initramfs"));
        let extent = |file: &File| Extent {
            offset: 0,
            length: file.metadata().unwrap().len(),
        };
        let machine = MachineConfig {
            memory: 256 << 20,
            max_memory: 256 << 20,
            vcpus: VCPUS,
            max_vcpus: VCPUS,
            file_server: false,
            disks: (0..)
                .zip(&disks)
                .map(|(slot, _)| DiskConfig {
                    serial: disk_serial(slot),
                    access: DiskAccess::ReadWrite,
                })
                .collect(),
            hotplug_disks: 0,
            kernel: extent(&kernel_file),
        };
        let software = Software::User {
            initramfs: Some(extent(&initramfs)),
            command_line: "console=ttyS0 panic=-1 quiet".to_owned(),
            uuid: [0x42; 16],
            oem_strings: vec!["nutshell.test=1".to_owned()],
            console_input: true,
            console_output: true,
            guest_agent: true,
            links,
        };
        let kvm = File::options().read(true).write(true).open("/dev/kvm").unwrap();
        let mut descriptors: Vec<OwnedFd> = vec![kvm.into(), kernel_file.into(), initramfs.into()];
        let (agent_port, port_end) = UnixStream::pair().unwrap();
        port_end.set_nonblocking(true).unwrap();
        agent_port.set_read_timeout(Some(GUEST_TIMEOUT)).unwrap();
        descriptors.extend([input_end.into(), output_end.into(), port_end.into()]);
        descriptors.extend(queues);
        descriptors.extend(disks.into_iter().map(OwnedFd::from));
        let (channel, vmm_channel) = Channel::pair().unwrap();
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        channel.send(&Command::Boot(machine, software), &borrowed).unwrap();
        drop(descriptors);
        let machine = thread::spawn(move || {
            let tail = Arc::new(ConsoleTail::default());
            let reason = match vmm::run(&vmm_channel, &tail, None) {
                Ok(vmm::LoopExit::Ended(reason)) => reason,
                Ok(vmm::LoopExit::ShimGone) => return,
                Err(error) => EndReason::BuildFailed(error.to_string()),
            };
            let console = tail.to_vec();
            vmm_channel.send(&Notice::Ended { reason, console }, &[]).unwrap();
        });
        let mut guest = Self {
            channel,
            input,
            output,
            console: String::new(),
            agent_port,
            machine,
        };
        guest.wait_for(&format!("ready: {}\r\n", release(kernel)));
        guest.console.clear();
        guest
    }

    /// Executes `command` in the guest, which must succeed, and returns its output.
    pub(super) fn run(&mut self, command: &str) -> String {
        self.write(command);
        self.wait_for("status: ");
        let (output, _) = self.console.split_once("status: ").unwrap();
        let output = output.replace('\r', "");
        // The next output begins after this line.
        self.wait_for("status: 0\r\n");
        self.console.clear();
        output
    }

    /// Writes `command` to the console, and does not wait.
    pub(super) fn write(&mut self, command: &str) {
        writeln!(self.input, "{command}").unwrap();
    }

    /// Whether a program in the guest has the port of the guest agent open.
    pub(super) fn has_agent_port_open(&self) -> bool {
        self.channel.send(&Command::ReadGuestAgentPort, &[]).unwrap();
        loop {
            match self.channel.receive().unwrap() {
                (Notice::GuestAgentPort { open }, _) => break open,
                (Notice::Ended { reason, .. }, _) => panic!("the machine ended: {reason}"),
                (other, _) => eprintln!("{other:?}"),
            }
        }
    }

    pub(super) fn press_power_button(&self) {
        self.channel.send(&Command::PressPowerButton, &[]).unwrap();
    }

    /// Waits for `text` on the console.
    pub(super) fn wait_for(&mut self, text: &str) {
        let deadline = Instant::now() + GUEST_TIMEOUT;
        while !self.console.contains(text) {
            let remaining = deadline.saturating_duration_since(Instant::now());
            let mut polled = [PollFd::new(&self.output, PollFlags::IN)];
            let ready = poll(&mut polled, Some(&Timespec::try_from(remaining).unwrap())).unwrap();
            let mut bytes = [0; 4096];
            let count = if ready == 0 {
                0
            } else {
                self.output.read(&mut bytes).unwrap()
            };
            if count == 0 {
                let ended = (ready != 0).then(|| self.channel.receive::<Notice>());
                panic!("{text:?} is not on the console: {}\nended: {ended:?}", self.console);
            }
            let text = String::from_utf8_lossy(&bytes[..count]);
            eprint!("{text}");
            self.console.push_str(&text);
        }
    }

    /// Waits for the end of the machine.
    pub(super) fn end(self) -> EndReason {
        // The guest's last output may be more than the pipe takes.
        let mut output = self.output;
        let reader = thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()));
        let deadline = Instant::now() + GUEST_TIMEOUT;
        let reason = loop {
            let remaining = deadline.saturating_duration_since(Instant::now());
            let mut polled = [PollFd::new(&self.channel, PollFlags::IN)];
            let ready = poll(&mut polled, Some(&Timespec::try_from(remaining).unwrap())).unwrap();
            assert!(ready == 1, "the machine does not end");
            match self.channel.receive::<Notice>().unwrap() {
                (Notice::Ended { reason, .. }, _) => break reason,
                (other, _) => eprintln!("{other:?}"),
            }
        };
        self.machine.join().unwrap();
        reader.join().unwrap().unwrap();
        reason
    }
}
