//! The state of a virtual machine from one boot to the next.

use std::{
    os::fd::OwnedFd,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::watch;
use uuid::Uuid;

use super::{
    error::VmError,
    kernel::{BootFiles, read_disk_kernel},
};
use crate::{
    oci::{OnReboot, Size},
    shim::{
        machine::{BootDisk, DiskImage, FINAL_NOTICE_TIMEOUT, Machine, UserBootRequest, VmmError},
        network::{MachineLinks, NetworkNames},
        pod::{Launcher, Pod, PodError},
        stdio::ConsoleStreams,
    },
};

/// How long the vmm may take to build the machine, which copies kernel and initramfs into its memory.
const BUILD_LIMIT: Duration = Duration::from_secs(30);

/// The kernel argument that selects the serial port as the console.
const CONSOLE: &str = "console=ttyS0";

/// If a guest resets the machine sooner than this after its start, the next boot is delayed, so that a guest that
/// reboots in a loop costs the host little.
const SHORT_RUN: Duration = Duration::from_secs(10);

/// The delay after the first short run. Each further short run doubles it.
const FIRST_REBOOT_DELAY: Duration = Duration::from_millis(500);

const MAX_REBOOT_DELAY: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(crate) enum KernelSource {
    /// The kernel that the disk's boot loader would boot. Each boot reads it again, because the guest may have replaced
    /// it.
    Disk,
    /// The same files at each boot.
    Files(BootFiles),
}

/// The settings of a virtual machine, which stay the same from one boot to the next.
#[derive(Debug)]
pub(crate) struct VmSettings {
    pub(crate) size: Size,
    /// Identifies the machine to its guest.
    pub(crate) uuid: Uuid,
    pub(crate) on_reboot: OnReboot,
    /// Appended to the kernel's command line.
    pub(crate) kernel_arguments: String,
    pub(crate) names: NetworkNames,
}

/// The virtual machine of a task. It runs in the machine of the pod.
#[derive(Debug)]
pub(crate) struct VirtualMachine {
    settings: VmSettings,
    /// `None` without a disk, and after [`Self::release`].
    disk: Mutex<Option<Arc<DiskImage>>>,
    kernel: KernelSource,
    /// The files for the next boot. `None` until they are read from the disk.
    boot_files: Mutex<Option<BootFiles>>,
    /// Unset until the task's streams are open.
    console: OnceLock<ConsoleStreams>,
    links: Mutex<Option<MachineLinks>>,
    /// The machine while the guest runs in it.
    running: Mutex<Option<Arc<Machine>>>,
    /// Whether a client has requested a shutdown of the guest.
    power_off_requested: AtomicBool,
    /// The exit status of the task, once a client has killed it.
    killed: watch::Sender<Option<u32>>,
    pace: Mutex<RebootPace>,
}

/// The delay before reboots.
#[derive(Debug)]
struct RebootPace {
    started: Instant,
    /// `None` if the last run was not short.
    last_delay: Option<Duration>,
}

impl RebootPace {
    /// Returns the delay of the next boot after a reset at `now`.
    fn next_delay(&mut self, now: Instant) -> Duration {
        self.last_delay = if now.duration_since(self.started) < SHORT_RUN {
            Some(
                self.last_delay
                    .map_or(FIRST_REBOOT_DELAY, |delay| (delay * 2).min(MAX_REBOOT_DELAY)),
            )
        } else {
            None
        };
        self.last_delay.unwrap_or_default()
    }
}

impl VirtualMachine {
    pub(crate) fn new(settings: VmSettings, disk: Option<Arc<DiskImage>>, kernel: KernelSource) -> Self {
        Self {
            settings,
            disk: Mutex::new(disk),
            kernel,
            boot_files: Mutex::default(),
            console: OnceLock::new(),
            links: Mutex::default(),
            running: Mutex::default(),
            power_off_requested: AtomicBool::new(false),
            killed: watch::Sender::new(None),
            pace: Mutex::new(RebootPace {
                started: Instant::now(),
                last_delay: None,
            }),
        }
    }

    pub(crate) fn on_reboot(&self) -> OnReboot {
        self.settings.on_reboot
    }

    /// The disk for the disk reader, if the kernel is on it.
    pub(crate) fn disk_to_read(&self) -> Option<BootDisk> {
        match self.kernel {
            KernelSource::Disk => self.boot_disk(true),
            KernelSource::Files(_) => None,
        }
    }

    fn boot_disk(&self, read_only: bool) -> Option<BootDisk> {
        let image = self.disk.lock().clone()?;
        Some(BootDisk::CopyOnWrite { image, read_only })
    }

    /// Finds the kernel for the next boot. If it is on the disk, this waits for `reader`, the machine of the disk
    /// reader.
    pub(crate) async fn find_kernel(&self, reader: &Machine, ready_timeout: Duration) -> Result<(), VmError> {
        if let KernelSource::Disk = self.kernel {
            let files = read_disk_kernel(reader, ready_timeout).await?;
            log::info!("the disk's kernel was found in {}", files.source());
            *self.boot_files.lock() = Some(files);
        }
        Ok(())
    }

    /// Sets the streams of the console, once.
    pub(crate) fn set_console(&self, console: ConsoleStreams) {
        // Called once, by the creation of the task.
        let _ = self.console.set(console);
    }

    /// Closes the disk and the streams of the console after the end of the machine. A client has `limit` to read the
    /// last output.
    pub(crate) async fn release(&self, limit: Duration) {
        self.disk.lock().take();
        if let Some(console) = self.console.get() {
            console.close(limit).await;
        }
    }

    /// Connects the links of a network namespace to the machine that boots next, unless that was done before.
    pub(crate) async fn connect_network(&self, namespace: OwnedFd) -> Result<(), VmError> {
        if self.links.lock().is_none() {
            let links = MachineLinks::connect(namespace, self.settings.size.vcpus.into(), &self.settings.names).await?;
            *self.links.lock() = Some(links);
        }
        Ok(())
    }

    /// Undoes [`Self::connect_network`].
    pub(crate) async fn disconnect_network(&self) {
        let links = self.links.lock().take();
        if let Some(links) = links {
            links.disconnect().await;
        }
    }

    /// Boots the kernel that [`Self::find_kernel`] has found, in `machine`. Returns when its vCPUs run.
    pub(crate) async fn boot(&self, machine: &Arc<Machine>, kvm: OwnedFd) -> Result<(), VmError> {
        let duplicate = |source| VmError::KernelMemory {
            step: "duplicate a descriptor",
            source,
        };
        let files = match &self.kernel {
            KernelSource::Disk => self.boot_files.lock().take(),
            KernelSource::Files(files) => Some(files.try_clone().map_err(duplicate)?),
        };
        let BootFiles {
            kernel,
            initramfs,
            command_line,
            ..
        } = files.ok_or_else(|| VmError::Kernel("it was booted before, and not read again".to_owned()))?;
        let (console_input, console_output) = match self.console.get() {
            Some(console) => console.for_machine().map_err(VmError::Console)?,
            None => (None, None),
        };
        let links = self.links.lock().as_ref().map(MachineLinks::for_machine);
        let request = UserBootRequest {
            kvm,
            size: self.settings.size,
            kernel,
            initramfs,
            command_line: complete_command_line(&command_line, &self.settings.kernel_arguments),
            uuid: self.settings.uuid.into_bytes(),
            console_input,
            console_output,
            guest_agent: None,
            links: links.transpose().map_err(VmError::Links)?.unwrap_or_default(),
            disks: self
                .boot_disk(false)
                .map(|disk| ("root".to_owned(), disk))
                .into_iter()
                .collect(),
            file_server: None,
        };
        self.pace.lock().started = Instant::now();
        machine.boot_user(request, BUILD_LIMIT).await.map_err(VmError::Start)?;
        *self.running.lock() = Some(machine.clone());
        Ok(())
    }

    /// Boots again after the guest has reset the machine of `pod`. Returns the new machine. Call it on the shim's main
    /// thread.
    ///
    /// # Errors
    ///
    /// [`VmError::Ended`] if a client has requested the end meanwhile.
    pub(crate) async fn reboot(
        &self,
        pod: &Pod,
        launcher: &dyn Launcher,
        ready_timeout: Duration,
    ) -> Result<Arc<Machine>, VmError> {
        self.running.lock().take();
        let delay = self.pace.lock().next_delay(Instant::now());
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = self.end_requested() => {}
            () = pod.closed() => {}
        }
        self.check_wanted()?;
        if let Some(disk) = self.disk_to_read() {
            let reader = pod.start_disk_reader(launcher, disk).await?;
            self.check_wanted()?;
            self.find_kernel(&reader, ready_timeout).await?;
        }
        let machine = pod.prepare_user_machine(launcher, self.settings.size).await?;
        self.check_wanted()?;
        let kvm = launcher.open_kvm().map_err(PodError::from)?;
        self.boot(&machine, kvm).await?;
        if self.is_end_requested() {
            // The request came while there was no machine whose power button could be pressed.
            machine.stop("a client has asked for its end");
        }
        Ok(machine)
    }

    /// Requests a shutdown: presses the power button, if a guest runs. From then on, a reset of the machine ends the
    /// task instead of booting again.
    ///
    /// # Errors
    ///
    /// The vmm is gone, or does not read its commands.
    pub(crate) async fn press_power_button(&self) -> Result<(), VmmError> {
        self.power_off_requested.store(true, Ordering::Relaxed);
        let running = self.running.lock().clone();
        match running {
            Some(machine) => match machine.press_power_button().await {
                Ok(()) => Ok(()),
                // The machine is ending anyway.
                Err(_)
                    if tokio::time::timeout(FINAL_NOTICE_TIMEOUT, machine.ended())
                        .await
                        .is_ok() =>
                {
                    Ok(())
                }
                Err(error) => Err(error),
            },
            None => {
                // Wakes a reboot that waits.
                self.killed.send_modify(|_| {});
                Ok(())
            }
        }
    }

    /// Ends the machine of `pod` at once. The task exits with `status`.
    pub(crate) fn kill(&self, pod: &Pod, status: u32) {
        self.killed.send_if_modified(|killed| killed.replace(status).is_none());
        pod.machine().stop("a client has killed it");
    }

    /// The exit status, if a client has killed the task.
    pub(crate) fn killed_status(&self) -> Option<u32> {
        *self.killed.borrow()
    }

    /// Whether a client has requested its end.
    pub(crate) fn is_end_requested(&self) -> bool {
        self.power_off_requested.load(Ordering::Relaxed) || self.killed_status().is_some()
    }

    async fn end_requested(&self) {
        let mut killed = self.killed.subscribe();
        // Cannot fail: `self` owns the sender.
        let _ = killed.wait_for(|_| self.is_end_requested()).await;
    }

    fn check_wanted(&self) -> Result<(), VmError> {
        match self.is_end_requested() {
            true => Err(VmError::Ended),
            false => Ok(()),
        }
    }
}

/// The kernel's command line: `line`, the serial console if it is missing, and the user's arguments.
fn complete_command_line(line: &str, arguments: &str) -> String {
    let names_console = |word: &str| word == CONSOLE || word.starts_with("console=ttyS0,");
    let console = match line
        .split_ascii_whitespace()
        .chain(arguments.split_ascii_whitespace())
        .any(names_console)
    {
        true => "",
        false => CONSOLE,
    };
    let parts = [line.trim(), console, arguments];
    let parts: Vec<_> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    parts.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_gets_the_console_unless_it_has_it() {
        for (line, arguments, expected) in [
            ("root=/dev/vda1 ro", "", "root=/dev/vda1 ro console=ttyS0"),
            ("", "", "console=ttyS0"),
            (
                "console=tty0 console=ttyS0,115200 ",
                "quiet",
                "console=tty0 console=ttyS0,115200 quiet",
            ),
            ("a", "console=ttyS0 b", "a console=ttyS0 b"),
            ("console=ttyS01", "", "console=ttyS01 console=ttyS0"),
        ] {
            assert_eq!(complete_command_line(line, arguments), expected);
        }
    }

    #[test]
    fn delay_before_a_reboot_grows_while_runs_are_short() {
        let start = Instant::now();
        let mut pace = RebootPace {
            started: start,
            last_delay: None,
        };
        let soon = start + Duration::from_secs(1);
        let delays: Vec<_> = (0..10).map(|_| pace.next_delay(soon)).collect();
        assert_eq!(delays[..3], [500, 1000, 2000].map(Duration::from_millis));
        assert_eq!(delays[9], MAX_REBOOT_DELAY);

        assert_eq!(pace.next_delay(start + SHORT_RUN), Duration::ZERO);
        assert_eq!(pace.next_delay(soon), FIRST_REBOOT_DELAY);
    }
}
