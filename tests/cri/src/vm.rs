//! Virtual machines with the disk of tests/images/disk, whose guest executes each line of its console.

use std::process::Command;

use crate::{
    messages::{ContainerState, Mount},
    pod::{Container, Pod, image},
    streaming::Streams,
    wait::wait_until,
};

/// The image with the disk.
pub(crate) const DISK: &str = "localhost/vm-raw:latest";

/// Starts the virtual machine of a pod, and waits for the guest.
pub(crate) fn start_vm(pod: &Pod, name: &str, mounts: &[Mount]) -> Container {
    let container = pod.start_with(name, &["vm"], |config| {
        config.image = image(DISK);
        config.tty = true;
        config.stdin = true;
        config.mounts = mounts.to_vec();
    });
    wait_for_output(&container, "ready: ");
    container
}

/// Waits until the console has printed `text`.
pub(crate) fn wait_for_output(container: &Container, text: &str) {
    wait_until(&format!("{text:?} on the console"), || {
        assert_eq!(
            container.status().state(),
            ContainerState::Running,
            "{}",
            container.output("stdout")
        );
        container.output("stdout").contains(text).then_some(())
    });
}

/// A mount of a path of the host.
pub(crate) fn mount(container_path: &str, host_path: &str) -> Mount {
    Mount {
        container_path: container_path.into(),
        host_path: host_path.into(),
        ..Default::default()
    }
}

/// Runs a program, asserts that it succeeds, and returns its output.
pub(crate) fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout).trim_end().to_owned();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{stdout}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    stdout
}

/// The console of a guest.
#[derive(Debug)]
pub(crate) struct Console {
    streams: Streams,
}

impl Console {
    /// Attaches to the console of a virtual machine.
    pub(crate) fn attach(container: &Container) -> Self {
        Self {
            streams: Streams::attach(container, true),
        }
    }

    /// Executes a line in the guest without waiting for its end.
    pub(crate) fn send(&mut self, line: &str) {
        self.streams.send(&format!("{line}\n"));
    }

    /// Reads until the guest has printed `text`.
    pub(crate) fn wait_for(&mut self, text: &str) {
        self.streams.wait_for(text);
    }

    /// Executes a line in the guest, asserts that it succeeds, and returns its output. It must not end the console's
    /// shell.
    pub(crate) fn run(&mut self, line: &str) -> String {
        self.streams.stdout.clear();
        self.send(&format!("echo; echo begin:; {line}; echo \"end: $? .\""));
        self.wait_for("end: ");
        // The number follows.
        self.wait_for(" .\r\n");
        let text = std::mem::take(&mut self.streams.stdout).replace('\r', "");
        let (_, rest) = text.split_once("\nbegin:\n").unwrap();
        let (output, status) = rest.split_once("end: ").unwrap();
        assert!(status.starts_with("0 "), "{line}\n{output}\nstatus {status}");
        output.trim_end().to_owned()
    }
}
