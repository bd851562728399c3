//! Execs in a virtual machine whose guest runs nutshell's agent as a service.

use std::{
    io::Read,
    time::{Duration, Instant},
};

use containerd_shim::protos::{
    api::{ResizePtyRequest, Status},
    ttrpc::{Code, context},
};
use nutshell_protocol::{Event, Exited, FromAgent, Request};
use serde_json::json;

use super::{
    Shim, error_of,
    guest_agent::{Streams, ls},
    process_exists,
};

impl Shim {
    /// Runs the virtual machine `v1`, and connects an agent of its guest.
    pub(super) async fn run_vm_with_agent() -> Self {
        let shim = Self::start().await;
        shim.run_vm("v1").await;
        shim.connect_agent("probe").await;
        shim
    }

    /// Connects an agent, and waits until the shim accepts an exec, which gets the id `probe`.
    pub(super) async fn connect_agent(&self, probe: &str) {
        let fake = self.fake.clone();
        tokio::task::spawn_blocking(move || fake.connect_agent()).await.unwrap();
        let begun = Instant::now();
        while let Err(error) = self.add_exec(probe, ls(), Streams::default()).await {
            assert!(begun.elapsed() < Duration::from_secs(20), "{error}");
            tokio::task::yield_now().await;
        }
    }
}

fn exit_of(exec: Option<&str>, status: u8) -> FromAgent {
    FromAgent::Event(Event::Exited(Exited {
        container: "v1".to_owned(),
        exec: exec.map(str::to_owned),
        status,
        exited_at: 0,
        stdout_bytes: 0,
        stderr_bytes: 0,
    }))
}

#[tokio::test]
async fn agent_runs_an_exec_with_a_terminal() {
    let shim = Shim::run_vm_with_agent().await;
    let streams = Streams {
        stdin: "e-in",
        stdout: "e-out",
        terminal: true,
        ..Streams::default()
    };
    shim.add_exec("e1", ls(), streams).await.unwrap();
    let resize = |width| ResizePtyRequest {
        id: "v1".to_owned(),
        exec_id: "e1".to_owned(),
        width,
        height: 17,
        ..ResizePtyRequest::default()
    };
    shim.task
        .resize_pty(context::Context::default(), &resize(91))
        .await
        .unwrap();
    let mut output = shim.open_output("e-out");

    let pid = shim.start_task("v1", "e1").await.unwrap();

    assert!(process_exists(pid));
    shim.task
        .resize_pty(context::Context::default(), &resize(60))
        .await
        .unwrap();
    let requests = shim.fake.requests();
    let started = requests.iter().find_map(|request| match request {
        Request::StartExec(start) => Some(start.stdio.clone()),
        _ => None,
    });
    let stdio = started.unwrap();
    assert_eq!((stdio.terminal, stdio.size), (true, Some((91, 17))));
    assert!(requests.iter().any(|request| matches!(
        request,
        Request::Resize {
            width: 60,
            height: 17,
            ..
        }
    )));
    let port = stdio.stdout.unwrap();
    let fake = shim.fake.clone();
    tokio::task::spawn_blocking(move || fake.write_to_stream(port, b"out"))
        .await
        .unwrap();
    let mut bytes = [0; 3];
    output.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"out");

    shim.kill("v1", "e1", 15).await.unwrap();
    assert_eq!(shim.wait("v1", "e1").await.unwrap(), 143);
    assert_eq!(shim.delete("v1", "e1").await.unwrap().exit_status, 143);
    assert!(!process_exists(pid));
    assert_eq!(shim.status("v1").await, Status::RUNNING);
}

#[tokio::test]
async fn end_of_the_agent_ends_its_execs_and_another_agent_can_connect() {
    let shim = Shim::run_vm_with_agent().await;
    shim.start_task("v1", "probe").await.unwrap();

    shim.fake.disconnect_agent();

    assert_eq!(shim.wait("v1", "probe").await.unwrap(), 137);
    let (code, text) = error_of(shim.add_exec("e1", ls(), Streams::default()).await);
    assert_eq!(code, Code::UNIMPLEMENTED);
    assert!(
        text.contains("neither nutshell's agent nor the QEMU guest agent answers"),
        "{text}"
    );
    shim.connect_agent("e2").await;
    shim.start_task("v1", "e2").await.unwrap();
    shim.kill("v1", "e2", 9).await.unwrap();
    assert_eq!(shim.wait("v1", "e2").await.unwrap(), 137);
    assert_eq!(shim.status("v1").await, Status::RUNNING);
}

#[tokio::test]
async fn agent_cannot_end_the_task_or_report_that_it_is_out_of_memory() {
    let mut shim = Shim::run_vm_with_agent().await;
    shim.start_task("v1", "probe").await.unwrap();
    shim.fake.send(&exit_of(None, 0));
    let out_of_memory = Event::OutOfMemory {
        container: "v1".to_owned(),
    };
    shim.fake.send(&FromAgent::Event(out_of_memory));

    shim.fake.send(&exit_of(Some("probe"), 3));

    assert_eq!(shim.wait("v1", "probe").await.unwrap(), 3);
    assert_eq!(shim.status("v1").await, Status::RUNNING);
    let expected = [
        "create",
        "start",
        "exec-added probe",
        "exec-started probe",
        "exit probe 3",
    ];
    assert_eq!(shim.next_events(5).await, expected);
    shim.assert_no_more_events().await;
}

#[tokio::test]
async fn agent_that_violates_the_protocol_loses_its_stream_and_the_machine_goes_on() {
    let shim = Shim::run_vm_with_agent().await;
    shim.start_task("v1", "probe").await.unwrap();

    shim.fake.write_to_agent_stream(&[0xff; 64]);

    assert_eq!(shim.wait("v1", "probe").await.unwrap(), 137);
    assert_eq!(shim.status("v1").await, Status::RUNNING);
    shim.connect_agent("e2").await;
}

#[tokio::test]
async fn machine_without_an_agent_accepts_no_connection() {
    let shim = Shim::start().await;
    for (id, exec) in [("v1", "qga"), ("v2", "none")] {
        shim.create_vm(id, json!({"io.containerd.nutshell.vm.exec": exec}))
            .await;
        shim.start_task(id, "").await.unwrap();
        assert!(!shim.fake.has_agent_port(), "{exec}");
    }
}
