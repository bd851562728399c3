//! The actions of an administrator on running pods: `ps`, `metrics`, `inspect ID`, `console ID` and
//! `shell ID`.
//!
//! Belongs here: finding the shims of this host, asking them, and printing their answers. Does not belong here: the
//! answers themselves, which [`crate::shim`] makes. The executable's `main` calls [`main`] if the first argument is one
//! of [`ROLES`].

mod client;
mod discovery;
mod metrics;
mod shell;

use std::{
    ffi::OsString,
    fmt::Write,
    io::{self, Write as _},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use self::{
    client::{CallError, call_console, call_report},
    discovery::find_sockets,
    shell::ShellError,
};
use crate::shim::report::{ContainerReport, MachineReport, ShimReport};

/// The first arguments that select this role.
pub(crate) const ROLES: [&str; 5] = ["ps", "metrics", "inspect", "console", "shell"];

/// containerd's state directory, unless `--state` names another.
const DEFAULT_STATE_DIRECTORY: &str = "/run/containerd";

/// A failed action.
#[derive(Debug, thiserror::Error)]
enum AdminError {
    #[error(
        "usage: containerd-shim-nutshell-v2 ps|metrics|inspect ID|console ID|shell ID [--json] [--state DIRECTORY]"
    )]
    Usage,
    #[error("cannot start the runtime for asynchronous calls: {0}")]
    Runtime(#[source] io::Error),
    #[error("no shim with a socket below {1} has a container {0}: `ps` lists all containers, with their namespaces")]
    NotFound(String, String),
    #[error("{0} is the id of containers in several namespaces: use NAMESPACE/{0}")]
    Ambiguous(String),
    #[error("{0}")]
    Call(#[from] CallError),
    #[error("{0}")]
    Shell(#[from] ShellError),
    #[error("cannot encode the report: {0}")]
    Encode(#[from] serde_json::Error),
    #[error("cannot print the answer: {0}")]
    Print(#[source] io::Error),
}

#[derive(Debug, PartialEq, Eq)]
enum Action {
    List,
    Metrics,
    Inspect(String),
    Console(String),
    Shell(String),
}

#[derive(Debug, PartialEq, Eq)]
struct Arguments {
    action: Action,
    json: bool,
    state: PathBuf,
}

/// Runs the action of the command line. An error is one line on standard error.
pub(crate) fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    match run(&arguments) {
        Ok(status) => status,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Returns the exit status.
fn run(arguments: &[OsString]) -> Result<ExitCode, AdminError> {
    let Arguments { action, json, state } = parse(arguments).ok_or(AdminError::Usage)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(AdminError::Runtime)?;
    let full = matches!(action, Action::Inspect(_) | Action::Metrics);
    let shims = runtime.block_on(ask_all(&state, full));
    let text = match action {
        Action::List if json => to_json(&shims.iter().map(|shim| &shim.report).collect::<Vec<_>>())?,
        Action::List => list(&shims),
        Action::Metrics => metrics::to_openmetrics(shims.iter().map(|shim| &shim.report)),
        Action::Inspect(name) => {
            let (shim, container) = find(&shims, &name, &state)?;
            if json {
                to_json(container)?
            } else {
                describe(&shim.report, container)
            }
        }
        Action::Console(name) => {
            let (shim, container) = find(&shims, &name, &state)?;
            runtime.block_on(call_console(&shim.socket, &container.id))?
        }
        Action::Shell(name) => {
            let (shim, container) = find(&shims, &name, &state)?;
            return Ok(shell::run(&runtime, &shim.socket, &container.id, &state)?.into());
        }
    };
    io::stdout().write_all(text.as_bytes()).map_err(AdminError::Print)?;
    Ok(ExitCode::SUCCESS)
}

/// `None` for a wrong command line.
fn parse(arguments: &[OsString]) -> Option<Arguments> {
    let (mut words, mut json, mut state) = (Vec::new(), false, PathBuf::from(DEFAULT_STATE_DIRECTORY));
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        // Ids and options are UTF-8. Only a path may be anything.
        match argument.to_str()? {
            "--json" => json = true,
            "--state" => state = rest.next()?.into(),
            option if option.starts_with('-') => return None,
            word => words.push(word),
        }
    }
    let action = match words[..] {
        ["ps"] => Action::List,
        ["metrics"] => Action::Metrics,
        ["inspect", id] => Action::Inspect(id.to_owned()),
        ["console", id] => Action::Console(id.to_owned()),
        ["shell", id] => Action::Shell(id.to_owned()),
        _ => return None,
    };
    Some(Arguments { action, json, state })
}

/// A shim that has answered.
#[derive(Debug)]
struct Shim {
    socket: PathBuf,
    report: ShimReport,
}

/// Asks all shims below containerd's state directory, at the same time. One that does not answer is named on standard
/// error.
async fn ask_all(state: &std::path::Path, full: bool) -> Vec<Shim> {
    let ask = |socket: PathBuf| {
        tokio::spawn(async move {
            let report = call_report(&socket, full).await?;
            Ok::<_, CallError>(Shim { socket, report })
        })
    };
    let calls: Vec<_> = find_sockets(state).into_iter().map(ask).collect();
    let mut shims = Vec::new();
    for call in calls {
        match call.await {
            Ok(Ok(shim)) => shims.push(shim),
            Ok(Err(error)) => eprintln!("{error}"),
            Err(error) => eprintln!("cannot ask a shim for its state: {error}"),
        }
    }
    shims
}

/// Finds the container `name`: an id, or NAMESPACE/ID.
fn find<'a>(
    shims: &'a [Shim],
    name: &str,
    state: &std::path::Path,
) -> Result<(&'a Shim, &'a ContainerReport), AdminError> {
    let (namespace, id) = match name.split_once('/') {
        Some((namespace, id)) => (Some(namespace), id),
        None => (None, name),
    };
    let mut found = shims
        .iter()
        .filter(|shim| namespace.is_none_or(|namespace| shim.report.namespace == namespace))
        .flat_map(|shim| shim.report.containers.iter().map(move |container| (shim, container)))
        .filter(|(_, container)| container.id == id);
    let first = found
        .next()
        .ok_or_else(|| AdminError::NotFound(name.to_owned(), state.display().to_string()))?;
    match found.next() {
        None => Ok(first),
        Some(_) => Err(AdminError::Ambiguous(id.to_owned())),
    }
}

fn to_json(value: &impl serde::Serialize) -> Result<String, AdminError> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

/// A table of all containers.
fn list(shims: &[Shim]) -> String {
    let mut rows = vec![
        [
            "NAMESPACE",
            "ID",
            "KIND",
            "STATE",
            "PID",
            "VMM",
            "MEMORY",
            "VCPUS",
            "AGE",
        ]
        .map(str::to_owned),
    ];
    for Shim { report, .. } in shims {
        rows.extend(report.containers.iter().map(|container| {
            let machine = &container.machine;
            [
                report.namespace.clone(),
                container.id.clone(),
                container.kind.clone(),
                container.state.clone(),
                container.pid.to_string(),
                machine.pid.to_string(),
                format!("{} MiB", machine.memory_bytes >> 20),
                machine.vcpus.to_string(),
                age(container.age_seconds),
            ]
        }));
    }
    to_table(&rows)
}

/// Lines of aligned columns.
fn to_table<const COLUMNS: usize>(rows: &[[String; COLUMNS]]) -> String {
    let widths: Vec<usize> = (0..COLUMNS)
        .map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
        .collect();
    let mut table = String::new();
    for row in rows {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        table.push_str(cells.join("  ").trim_end());
        table.push('\n');
    }
    table
}

fn age(seconds: u64) -> String {
    // Two units, such as `3days 4h`.
    let text = humantime::format_duration(Duration::from_secs(seconds)).to_string();
    text.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

/// The devices of a machine.
fn list_devices(machine: &MachineReport) -> String {
    if let Some(error) = &machine.devices_error {
        return format!("{:<18}not known, the vmm gave no answer: {error}\n", "devices:");
    }
    let mut rows = vec![
        [
            "DEVICE",
            "REQUESTS",
            "ERRORS",
            "STALLS",
            "TO GUEST",
            "FROM GUEST",
            "FILE",
        ]
        .map(str::to_owned),
    ];
    rows.extend(machine.devices.iter().map(|device| {
        [
            device.name.clone(),
            device.requests.to_string(),
            device.errors.to_string(),
            device.stalls.to_string(),
            device.bytes_to_guest.to_string(),
            device.bytes_from_guest.to_string(),
            device.path.clone().unwrap_or_default(),
        ]
    }));
    format!("\n{}", to_table(&rows))
}

/// All that is known of a container: one property in a line, then its devices.
fn describe(shim: &ShimReport, container: &ContainerReport) -> String {
    let machine = &container.machine;
    let milliseconds = |value: Option<u64>| value.map_or("not yet".to_owned(), |value| format!("{value} ms"));
    let from_vmm = |value| match (value, &machine.devices_error) {
        (None, Some(_)) => "not known".to_owned(),
        (value, _) => milliseconds(value),
    };
    let phases = &machine.phases;
    let state = match container.exit_status {
        Some(status) => format!("{}, with status {status}", container.state),
        None => container.state.clone(),
    };
    let mut lines = vec![
        ("namespace", shim.namespace.clone()),
        ("id", container.id.clone()),
        ("kind", container.kind.clone()),
        ("state", state),
        ("age", age(container.age_seconds)),
        ("pid", container.pid.to_string()),
        ("pid in the guest", container.guest_pid.to_string()),
        ("execs", container.execs.join(", ")),
        ("bundle", container.bundle.clone()),
        ("shim", format!("{}, version {}", shim.pid, shim.version)),
        ("vmm", machine.pid.to_string()),
        (
            "file server",
            machine.file_server_pid.map_or("none".to_owned(), |pid| pid.to_string()),
        ),
        (
            "machine",
            format!("{} MiB, {} vCPUs", machine.memory_bytes >> 20, machine.vcpus),
        ),
        (
            "guest kernel",
            machine.kernel.clone().unwrap_or_else(|| "not ready".to_owned()),
        ),
        ("spawn", format!("{} ms", phases.spawn_milliseconds)),
        ("vmm ready", from_vmm(phases.vmm_ready_milliseconds)),
        ("kernel", from_vmm(phases.kernel_milliseconds)),
        ("agent ready", milliseconds(phases.agent_ready_milliseconds)),
        ("created", milliseconds(container.create_milliseconds)),
        ("started", milliseconds(container.started_milliseconds)),
        ("start call", milliseconds(container.start_milliseconds)),
    ];
    if container.kind == "vm" {
        let agent = container.guest_agent.clone();
        lines.push(("guest agent", agent.unwrap_or_else(|| "no answer".to_owned())));
    }
    let mut text = String::new();
    for (name, value) in lines {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{:<18}{value}", format!("{name}:"));
    }
    text.push_str(&list_devices(machine));
    text
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use super::*;
    use crate::shim::report::{DeviceReport, MachinePhases};

    fn arguments(line: &str) -> Option<Arguments> {
        let words: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
        parse(&words)
    }

    #[test]
    fn only_the_state_directory_may_be_other_than_utf_8() {
        let other = || OsString::from_vec(vec![b'/', 0xff]);
        let parsed = parse(&["ps".into(), "--state".into(), other()]).unwrap();
        assert_eq!(parsed.state, PathBuf::from(other()));
        assert_eq!(parse(&["inspect".into(), other()]), None);
    }

    fn container(id: &str) -> ContainerReport {
        ContainerReport {
            id: id.to_owned(),
            kind: "container".to_owned(),
            state: "running".to_owned(),
            exit_status: None,
            pid: 41,
            guest_pid: 7,
            bundle: "/run/b".to_owned(),
            guest_agent: None,
            execs: vec!["e1".to_owned()],
            age_seconds: 90_061,
            create_milliseconds: Some(150),
            started_milliseconds: None,
            start_milliseconds: None,
            machine: MachineReport {
                pid: 40,
                sandbox: id.to_owned(),
                file_server_pid: None,
                memory_bytes: 512 << 20,
                vcpus: 2,
                kernel: Some("6.12".to_owned()),
                boot_milliseconds: Some(124),
                phases: MachinePhases {
                    spawn_milliseconds: 0,
                    vmm_ready_milliseconds: Some(12),
                    kernel_milliseconds: Some(31),
                    agent_ready_milliseconds: Some(130),
                },
                devices: vec![
                    DeviceReport {
                        name: "nutshell-0".to_owned(),
                        path: Some("/images/1".to_owned()),
                        requests: 20,
                        errors: 1,
                        bytes_to_guest: 81_920,
                        bytes_from_guest: 512,
                        stalls: 2,
                    },
                    DeviceReport {
                        name: "rng".to_owned(),
                        path: None,
                        requests: 3,
                        errors: 0,
                        bytes_to_guest: 96,
                        bytes_from_guest: 0,
                        stalls: 0,
                    },
                ],
                devices_error: None,
            },
        }
    }

    pub(super) fn shim(namespace: &str, ids: &[&str]) -> Shim {
        Shim {
            socket: "/socket".into(),
            report: ShimReport {
                version: "1".to_owned(),
                pid: 39,
                namespace: namespace.to_owned(),
                containers: ids.iter().map(|id| container(id)).collect(),
            },
        }
    }

    #[test]
    fn command_line_selects_action_and_options() {
        let state = PathBuf::from(DEFAULT_STATE_DIRECTORY);
        for (line, action, json, state) in [
            ("ps", Action::List, false, state.clone()),
            ("ps --json --state /run/x", Action::List, true, "/run/x".into()),
            (
                "inspect c1 --json",
                Action::Inspect("c1".to_owned()),
                true,
                state.clone(),
            ),
            ("metrics", Action::Metrics, false, state.clone()),
            ("console c1", Action::Console("c1".to_owned()), false, state.clone()),
            ("shell c1", Action::Shell("c1".to_owned()), false, state),
        ] {
            assert_eq!(arguments(line), Some(Arguments { action, json, state }), "{line}");
        }
        for line in ["inspect", "ps c1", "console a b", "ps --all", "ps --state"] {
            assert_eq!(arguments(line), None, "{line}");
        }
    }

    #[test]
    fn list_has_aligned_columns() {
        assert_eq!(
            list(&[shim("k8s.io", &["a-long-id", "b"])]),
            "NAMESPACE  ID         KIND       STATE    PID  VMM  MEMORY   VCPUS  AGE\n\
             k8s.io     a-long-id  container  running  41   40   512 MiB  2      1day 1h\n\
             k8s.io     b          container  running  41   40   512 MiB  2      1day 1h\n"
        );
    }

    #[test]
    fn container_is_found_by_its_id_or_by_namespace_and_id() {
        let shims = [shim("default", &["a", "b"]), shim("k8s.io", &["b"])];
        let found = |name| {
            find(&shims, name, "/run".as_ref())
                .map(|(shim, container)| (shim.report.namespace.as_str(), container.id.as_str()))
        };
        assert_eq!(found("a").unwrap(), ("default", "a"));
        assert_eq!(found("k8s.io/b").unwrap(), ("k8s.io", "b"));
        assert!(matches!(found("b"), Err(AdminError::Ambiguous(_))));
        assert!(matches!(found("k8s.io/a"), Err(AdminError::NotFound(..))));
    }

    #[test]
    fn description_has_the_phases_of_the_start_and_the_devices() {
        let text = describe(&shim("default", &[]).report, &container("a"));
        let expected = "\
spawn:            0 ms
vmm ready:        12 ms
kernel:           31 ms
agent ready:      130 ms
created:          150 ms
started:          not yet
start call:       not yet

DEVICE      REQUESTS  ERRORS  STALLS  TO GUEST  FROM GUEST  FILE
nutshell-0  20        1       2       81920     512         /images/1
rng         3         0       0       96        0
";
        assert!(text.ends_with(expected), "{text}");
    }

    #[test]
    fn guest_agent_of_a_virtual_machine_is_described() {
        let line = |container: &ContainerReport| {
            let text = describe(&shim("default", &[]).report, container);
            text.lines()
                .find(|line| line.starts_with("guest agent:"))
                .map(str::to_owned)
        };
        let mut vm = container("a");
        assert_eq!(line(&vm), None);
        vm.kind = "vm".to_owned();
        assert_eq!(line(&vm).unwrap(), "guest agent:      no answer");
        vm.guest_agent = Some("QEMU 9.2.0".to_owned());
        assert_eq!(line(&vm).unwrap(), "guest agent:      QEMU 9.2.0");
    }

    #[test]
    fn vmm_that_gave_no_answer_is_named_and_the_rest_is_described() {
        let mut container = container("a");
        let machine = &mut container.machine;
        machine.devices.clear();
        machine.devices_error = Some("the vmm did not answer within 1 s".to_owned());
        machine.phases = MachinePhases {
            agent_ready_milliseconds: Some(130),
            ..MachinePhases::default()
        };

        let text = describe(&shim("default", &[]).report, &container);

        for line in [
            "vmm ready:        not known",
            "agent ready:      130 ms",
            "devices:          not known, the vmm gave no answer: the vmm did not answer within 1 s",
        ] {
            assert!(text.lines().any(|found| found == line), "{text}");
        }
    }
}
