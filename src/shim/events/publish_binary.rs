//! Delivery by `containerd publish`.

use std::{
    io::{self, Write},
    path::PathBuf,
    process::{Command, Stdio},
};

use containerd_shim::protos::{protobuf::Message, shim::event::Envelope};
use tokio::net::UnixStream;

use super::forwarder::{FORWARD_LIMIT, ForwardError, Forwarder};
use crate::shim::{
    blocking,
    child::{Child, WaitStatus},
    descriptor_limit,
};

/// Runs containerd's executable once per event. Used when containerd passes no ttrpc address.
#[derive(Debug)]
pub(crate) struct BinaryForwarder {
    /// containerd's executable.
    pub(crate) program: PathBuf,
    /// The path of containerd's gRPC socket.
    pub(crate) address: String,
}

impl Forwarder for BinaryForwarder {
    async fn forward(&mut self, envelope: Envelope) -> Result<(), ForwardError> {
        let program = self.program.display();
        let failed = |step: &str, error: io::Error| ForwardError::Unreachable(format!("{step}: {error}"));
        let event = envelope.event.write_to_bytes();
        let event = event.map_err(|error| ForwardError::Refused(format!("it cannot be encoded: {error}")))?;
        let (reader, mut writer) = io::pipe().map_err(|error| failed("create a pipe", error))?;
        let mut command = Command::new(&self.program);
        command
            .args(["--address", &self.address, "publish", "--topic", &envelope.topic])
            .args(["--namespace", &envelope.namespace])
            .stdin(reader)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        descriptor_limit::restore_for(&mut command);
        // The start of a program on a hung file system does not return.
        let spawn = move || command.spawn().and_then(|child| Child::from_std(&child));
        let child = blocking::run("start containerd's executable", spawn)
            .await
            .map_err(|error| ForwardError::Unreachable(error.to_string()))?
            .map_err(|error| failed(&format!("start {program}"), error))?;
        // An event is far smaller than a pipe's buffer, so this does not block.
        let written = writer.write_all(&event);
        written.map_err(|error| failed(&format!("write the event to {program}"), error))?;
        drop(writer);
        match tokio::time::timeout(FORWARD_LIMIT, child.reap()).await {
            Ok(Ok(WaitStatus::Exited(0))) => Ok(()),
            Ok(Ok(status)) => {
                let text = format!("{program} {status}");
                // The status does not tell whether containerd refused the event or cannot be reached.
                Err(match UnixStream::connect(&self.address).await {
                    Ok(_) => ForwardError::Refused(text),
                    Err(_) => ForwardError::Unreachable(text),
                })
            }
            Ok(Err(error)) => Err(failed(&format!("wait for {program}"), error)),
            Err(_) => {
                child.end("containerd's executable").await;
                Err(ForwardError::Unreachable(format!(
                    "{program} did not exit within {} s",
                    FORWARD_LIMIT.as_secs()
                )))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use containerd_shim::protos::{events::task::TaskStart, protobuf::well_known_types::any::Any};
    use nutshell_fixtures::HungVolume;

    use super::*;
    use crate::shim::{blocking::tests::leaves_thread_free, events::EventQueue, tests::script::write_script};

    #[tokio::test]
    async fn program_on_a_hung_file_system_does_not_block_the_thread() {
        let volume = HungVolume::mount_temporary();
        let mut forwarder = BinaryForwarder {
            program: volume.path().join("containerd"),
            address: "/no/such/socket".to_owned(),
        };
        assert!(leaves_thread_free(volume, forwarder.forward(Envelope::default())).await);
    }

    #[tokio::test]
    async fn program_gets_the_event_on_its_standard_input() {
        let folder = tempfile::tempdir().unwrap();
        let (program, out) = (folder.path().join("publish"), folder.path().join("out"));
        write_script(&program, &format!("echo \"$@\" > {0}; cat >> {0}\n", out.display()));
        let address = "/run/containerd/containerd.sock".to_owned();
        let queue = EventQueue::start("default", BinaryForwarder { program, address });

        queue.publish("c1", TaskStart::default());
        queue.flush(Duration::from_secs(20)).await;

        let text = std::fs::read(out).unwrap();
        let expected = b"--address /run/containerd/containerd.sock publish --topic /tasks/start --namespace default\n";
        let event = Any::parse_from_bytes(text.strip_prefix(expected).unwrap()).unwrap();
        assert_eq!(event.type_url, "containerd.events.TaskStart");
    }
}
