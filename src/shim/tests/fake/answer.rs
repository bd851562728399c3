//! The answers of the agent of a fake machine.

use std::time::{SystemTime, UNIX_EPOCH};

use nutshell_protocol::{
    ClockReading, CreateContainer, DiskKernel, Event, Failure, FailureKind, ProcessEntry, Request, Response, SetUpPod,
    StartExec,
};

use super::{Fake, exit_event, missing_program};
use crate::{
    control::{DeviceCounters, MachineStatistics, monotonic_now},
    shim::tests::behaviour::Behaviour,
};

impl Fake {
    pub(super) fn answer(&self, request: Request) -> (Result<Response, Failure>, Option<Event>) {
        match request {
            Request::SetUpPod(SetUpPod { sysctls, .. }) if sysctls.iter().any(|(name, _)| name == "no.such") => {
                let failure = Failure {
                    kind: FailureKind::InvalidArgument,
                    message: "sysctl no.such: this kernel has no such parameter".to_owned(),
                };
                (Err(failure), None)
            }
            Request::CreateContainer(CreateContainer {
                container, spec, stdio, ..
            }) => {
                if let Some(failure) = missing_program(&spec) {
                    return (Err(failure), None);
                }
                self.state().ports.insert((container, None), stdio);
                (Ok(Response::Created { pid: 1000 }), None)
            }
            Request::StartExec(StartExec {
                container,
                exec,
                process,
                stdio,
            }) => {
                if let Some(failure) = missing_program(&process) {
                    return (Err(failure), None);
                }
                self.state().ports.insert((container, Some(exec)), stdio);
                (Ok(Response::Created { pid: 2000 }), None)
            }
            Request::Signal { signal: 9, .. } if matches!(self.behaviour, Behaviour::SurvivesKill(_)) => {
                (Ok(Response::Done), None)
            }
            Request::BlockedThreads { .. } => {
                let threads = self.behaviour.blocked_threads(self.state().requests.len());
                (Ok(Response::BlockedThreads(threads)), None)
            }
            Request::Signal {
                container,
                exec,
                signal: signal @ (9 | 15),
                ..
            } => {
                let status = 128 + u8::try_from(signal).unwrap();
                (
                    Ok(Response::Done),
                    Some(exit_event(&container, exec.as_deref(), status, [0, 0])),
                )
            }
            Request::Processes { .. } => (
                Ok(Response::Processes(vec![
                    ProcessEntry { pid: 1000, exec: None },
                    ProcessEntry {
                        pid: 2000,
                        exec: Some("e1".to_owned()),
                    },
                    ProcessEntry { pid: 3000, exec: None },
                ])),
                None,
            ),
            Request::DeleteContainer { container } => {
                self.close_outputs(&container);
                (Ok(Response::Done), None)
            }
            Request::FindDiskKernel {
                kernel_stream_port,
                initrd_stream_port,
                ..
            } => {
                let answer = match self.behaviour {
                    Behaviour::NoKernel => Err(Failure {
                        kind: FailureKind::Internal,
                        message: "disk slot 0: no boot loader".to_owned(),
                    }),
                    _ => {
                        self.write_to_stream(kernel_stream_port, b"kernel");
                        self.write_to_stream(initrd_stream_port, b"initrd");
                        Ok(Response::DiskKernel(DiskKernel {
                            kernel_size: 6,
                            initrd_size: 6,
                            command_line: "root=/dev/vda1".to_owned(),
                            source: "grub.cfg".to_owned(),
                        }))
                    }
                };
                (answer, None)
            }
            Request::Stats { .. } => (Ok(Response::Stats(Box::default())), None),
            // The clock of the fake guest is the host's.
            Request::SetClock { .. } | Request::SteerClock(_) | Request::ReadClock => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
                let nanoseconds = i64::try_from(now.as_nanos()).unwrap();
                let lead = Some((0, 0));
                (Ok(Response::Clock(ClockReading { nanoseconds, lead })), None)
            }
            _ => (Ok(Response::Done), None),
        }
    }
}

/// The devices of a fake machine.
pub(super) fn statistics() -> MachineStatistics {
    let device = |name: &str, requests| DeviceCounters {
        name: name.to_owned(),
        requests,
        errors: 1,
        bytes_to_guest: 4096,
        ..DeviceCounters::default()
    };
    MachineStatistics {
        devices: vec![
            device("vsock", 9),
            device("nutshell-0", 7),
            device("\x1b[31mred", 0),
            device("serial", 0),
        ],
        built_at: Some(monotonic_now()),
        first_io_at: None,
    }
}
