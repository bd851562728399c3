//! `start`: find the shim of a container's group, or start it, and print where it serves.
//!
//! containerd waits for it twice per container, so it is a plain process without threads: one look at
//! the bundle, one socket, one spawn. The shim gets the listening socket as its standard input and the
//! locked pid file as its standard output; by the time the address is printed it can be connected to.

use std::{
    collections::HashMap,
    env, fs,
    io::{self, IsTerminal, Read, Write},
    os::unix::{fs::OpenOptionsExt, process::parent_id},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use containerd_shim_protos::{
    bootstrap_api::{BootstrapParams, LogLevel},
    protobuf::{Enum, Message, well_known_types::any::Any},
};
use rustix::thread::{CoreSchedulingScope, create_core_scheduling_cookie};

use crate::oci::{self, PlanError};
use crate::shim::{
    configuration::{Configuration, ConfigurationError},
    entry::arguments::Target,
    entry::options::{Options, OptionsError},
    entry::socket::{self, Acquired, SocketError},
    record::{PidFile, RecordError},
};

/// More than any containerd sends: the limit of its own messages.
const LONGEST_INPUT: u64 = 4 << 20;

const OOM_SCORE_ADJ_MAX: i32 = 1000;

/// Who names a configuration.
const NAMED_BY: &str = "it is the ConfigPath in the options of this runtime in containerd's configuration, or \
    ctr's --runtime-config-path";

/// Why no shim was started. One line, which containerd shows to its user.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootstrapError {
    /// Standard input holds neither form of containerd's request.
    #[error("standard input is neither a BootstrapParams nor an Any of runtime options")]
    Input,
    /// Standard input is too long.
    #[error("standard input is longer than {LONGEST_INPUT} bytes")]
    InputTooLong,
    /// The runtime options cannot be decoded.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// The configuration is relative to who knows what.
    #[error("configuration {}: the path must be absolute: {NAMED_BY}", .0.display())]
    RelativeConfiguration(PathBuf),
    /// The configuration that somebody named is not there.
    #[error("{0}: {NAMED_BY}: make that file readable, or name none")]
    NamedConfiguration(#[source] ConfigurationError),
    /// The configuration is the options section of containerd's, and cannot be used. containerd passes a
    /// section without ConfigPath on as it is, also one that was copied from runc's.
    #[error(
        "the options of this runtime in containerd's configuration: {0}: they may have a ConfigPath, or what \
         /etc/nutshell/config.toml may have, and nothing of runc's"
    )]
    OptionsSection(String),
    /// The configuration cannot be used.
    #[error(transparent)]
    Configuration(#[from] ConfigurationError),
    /// The bundle's spec cannot be read.
    #[error(transparent)]
    Spec(#[from] PlanError),
    /// The socket cannot be made.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The pid file cannot be made.
    #[error("another shim holds, or nobody may write, {0}")]
    PidFile(#[from] RecordError),
    /// Anything of the operating system's.
    #[error("{doing}: {source}")]
    System {
        /// What was tried, on what.
        doing: String,
        /// Why it failed.
        source: io::Error,
    },
}

fn system(doing: impl Into<String>) -> impl FnOnce(io::Error) -> BootstrapError {
    let doing = doing.into();
    |source| BootstrapError::System { doing, source }
}

/// Starts the shim of `target`, whose bundle is the current directory.
pub(crate) fn start(target: &Target) -> Result<(), BootstrapError> {
    let bundle = env::current_dir().map_err(system("find the bundle"))?;
    let request = StartRequest::parse(&input()?, target)?;
    let configuration = configuration(&request.options, &bundle)?;
    let group = Group::of(&oci::read_annotations(&bundle)?).map_or(target.id.to_string(), Group::into_key);
    let socket = socket::path(
        request.socket_directory.as_deref(),
        &target.address,
        &target.namespace,
        &group,
    );
    let address = format!("unix://{}", socket.display());
    if let Acquired::New(listener) = socket::acquire(&socket)? {
        let started = prepare(&request.options).and_then(|()| {
            let pid_file = PidFile::create(&bundle)?;
            let mut shim = command(target, &request, &socket, configuration.as_deref())?;
            shim.stdin(Stdio::from(listener));
            shim.stdout(Stdio::from(pid_file.share().map_err(system("share the pid file"))?));
            let shim = shim.spawn().map_err(system("start the shim"))?;
            pid_file.write(shim.id()).map_err(system("write the pid file"))
        });
        if let Err(error) = started {
            // The listener went with the command; the error that matters is the first.
            let _ = socket::remove_stale(&socket);
            return Err(error);
        }
    }
    fs::write(bundle.join("address"), &address).map_err(system("write the address into the bundle"))?;
    let answer = serde_json::json!({"version": request.version(), "address": address, "protocol": "ttrpc"});
    io::stdout()
        .write_all(answer.to_string().as_bytes())
        .map_err(system("print the address"))
}

/// All of standard input, unless a person types there.
fn input() -> Result<Vec<u8>, BootstrapError> {
    let stdin = io::stdin();
    let mut bytes = Vec::new();
    if stdin.is_terminal() {
        return Ok(bytes);
    }
    stdin
        .take(LONGEST_INPUT + 1)
        .read_to_end(&mut bytes)
        .map_err(system("read standard input"))?;
    if bytes.len() as u64 > LONGEST_INPUT {
        return Err(BootstrapError::InputTooLong);
    }
    Ok(bytes)
}

/// What containerd asks beside the command line.
#[derive(Debug, Default, PartialEq)]
struct StartRequest {
    /// containerd is 2.3 or later.
    bootstrap: bool,
    options: Options,
    socket_directory: Option<PathBuf>,
    ttrpc_address: Option<String>,
    debug: bool,
}

impl StartRequest {
    /// Standard input is empty, an `Any` of runtime options (up to containerd 2.2), or a
    /// `BootstrapParams` (2.3 and later). The fields of the last two overlap on the wire, so what
    /// tells them apart is that a `BootstrapParams` repeats the command line.
    fn parse(bytes: &[u8], target: &Target) -> Result<Self, BootstrapError> {
        if bytes.is_empty() {
            return Ok(Self::default());
        }
        let parameters = BootstrapParams::parse_from_bytes(bytes).ok().filter(|parameters| {
            parameters.instance_id == target.id.as_str() && parameters.namespace == target.namespace
        });
        match parameters {
            Some(parameters) => Self::from_parameters(&parameters),
            None => Ok(Self {
                options: Options::decode(&any(bytes).ok_or(BootstrapError::Input)?)?,
                ..Self::default()
            }),
        }
    }

    fn from_parameters(parameters: &BootstrapParams) -> Result<Self, BootstrapError> {
        let mut options = Options::default();
        for extension in parameters
            .extensions
            .iter()
            .filter_map(|extension| extension.value.as_ref())
        {
            let decoded = Options::decode(extension)?;
            if decoded != Options::default() {
                options = decoded;
            }
        }
        let directory = parameters
            .socket_dir
            .as_deref()
            .filter(|directory| !directory.is_empty());
        let ttrpc_address = Some(&parameters.containerd_ttrpc_address).filter(|address| !address.is_empty());
        Ok(Self {
            bootstrap: true,
            options,
            socket_directory: directory.map(PathBuf::from),
            ttrpc_address: ttrpc_address.cloned(),
            debug: parameters.log_level.value() <= LogLevel::LOG_LEVEL_DEBUG.value(),
        })
    }

    /// The version of the answer: containerd before 2.0 refuses 3, all take 2
    /// (containerd `core/runtime/v2/shim.go`).
    fn version(&self) -> u32 {
        if self.bootstrap { 3 } else { 2 }
    }
}

fn any(bytes: &[u8]) -> Option<Any> {
    Any::parse_from_bytes(bytes).ok().filter(|any| !any.type_url.is_empty())
}

/// What containers have in common that one shim serves.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Group {
    /// The sandbox of a pod, whose container is there first and goes last.
    Pod(String),
    /// A name that somebody chose: no member is more than another.
    Named(String),
}

impl Group {
    /// From a spec's annotations, as runc's shim reads them (containerd `cmd/containerd-shim-runc-v2/manager`).
    pub(crate) fn of(annotations: &HashMap<String, String>) -> Option<Self> {
        let value = |name| annotations.get(name).filter(|value| !value.is_empty()).cloned();
        value("io.containerd.nutshell.v2.group")
            .or_else(|| value("io.containerd.runc.v2.group"))
            .map(Self::Named)
            .or_else(|| value("io.kubernetes.cri.sandbox-id").map(Self::Pod))
    }

    fn into_key(self) -> String {
        match self {
            Self::Pod(key) | Self::Named(key) => key,
        }
    }
}

/// The configuration that the options name, checked here, where an error still reaches a user.
fn configuration(options: &Options, bundle: &Path) -> Result<Option<PathBuf>, BootstrapError> {
    match options {
        Options {
            config_path: Some(path),
            ..
        } if path.is_relative() => Err(BootstrapError::RelativeConfiguration(path.clone())),
        Options {
            config_path: Some(path),
            ..
        } => {
            Configuration::load(Some(path)).map_err(|error| match error {
                ConfigurationError::Unreadable { .. } => BootstrapError::NamedConfiguration(error),
                ConfigurationError::Malformed { .. } => error.into(),
            })?;
            Ok(Some(path.clone()))
        }
        Options {
            config_body: Some(body),
            ..
        } => {
            let path = bundle.join("nutshell.toml");
            let write = || {
                let mut file = fs::OpenOptions::new()
                    .write(true)
                    .create(true)
                    .truncate(true)
                    .mode(0o600)
                    .open(&path)?;
                file.write_all(body.as_bytes())
            };
            write().map_err(system("write the configuration into the bundle"))?;
            Configuration::load(Some(&path)).map_err(|error| match error {
                ConfigurationError::Malformed { reason, .. } => BootstrapError::OptionsSection(reason),
                ConfigurationError::Unreadable { .. } => error.into(),
            })?;
            Ok(Some(path))
        }
        Options { .. } => {
            Configuration::load(None)?;
            Ok(None)
        }
    }
}

/// Puts this process where the shim is to be: it inherits all of it.
fn prepare(options: &Options) -> Result<(), BootstrapError> {
    if env::var_os("SCHED_CORE").is_some_and(|value| !value.is_empty()) {
        create_core_scheduling_cookie(rustix::process::getpid(), CoreSchedulingScope::ProcessGroup)
            .map_err(|error| system("SCHED_CORE: create a core scheduling cookie")(error.into()))?;
    }
    if let Some(cgroup) = &options.shim_cgroup {
        let processes = Path::new("/sys/fs/cgroup")
            .join(cgroup.trim_start_matches('/'))
            .join("cgroup.procs");
        fs::write(&processes, "0").map_err(system(format!("join shim_cgroup: {}", processes.display())))?;
    }
    let parent = format!("/proc/{}/oom_score_adj", parent_id());
    let score = fs::read_to_string(&parent).map_err(system(&parent))?;
    // The kernel prints a number from -1000 to 1000 there (proc_pid_oom_score_adj(5)).
    let score = score.trim().parse().unwrap_or(0).min(OOM_SCORE_ADJ_MAX - 1) + 1;
    let own = "/proc/self/oom_score_adj";
    fs::write(own, score.to_string()).map_err(system(own))
}

fn command(
    target: &Target,
    request: &StartRequest,
    socket: &Path,
    configuration: Option<&Path>,
) -> Result<Command, BootstrapError> {
    let mut shim = Command::new(env::current_exe().map_err(system("find this executable"))?);
    shim.args([
        "-namespace",
        &target.namespace,
        "-id",
        target.id.as_str(),
        "-address",
        &target.address,
    ]);
    if let Some(publish_binary) = &target.publish_binary {
        shim.arg("-publish-binary").arg(publish_binary);
    }
    if target.debug || request.debug {
        shim.arg("-debug");
    }
    shim.arg("-socket").arg(socket);
    if let Some(configuration) = configuration {
        shim.arg("-configuration").arg(configuration);
    }
    if let Some(address) = &request.ttrpc_address {
        shim.env("TTRPC_ADDRESS", address);
    }
    shim.stderr(Stdio::null());
    Ok(shim)
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::{
        bootstrap_api::Extension,
        protobuf::{EnumOrUnknown, MessageField},
    };

    use super::*;

    /// As containerd 1.7 and 2.1 send it for `ctr run --runtime-config-path /etc/x.toml`.
    const CTR: &[u8] = b"\x0a\x19runtimeoptions.v1.Options\x12\x0d\x12\x0b/etc/x.toml";

    fn target() -> Target {
        Target {
            id: "c1".parse().unwrap(),
            namespace: "default".to_owned(),
            address: "/run/containerd/containerd.sock".to_owned(),
            publish_binary: None,
            debug: false,
        }
    }

    fn parse(bytes: &[u8]) -> Result<StartRequest, BootstrapError> {
        StartRequest::parse(bytes, &target())
    }

    fn parameters(id: &str, namespace: &str) -> BootstrapParams {
        BootstrapParams {
            instance_id: id.to_owned(),
            namespace: namespace.to_owned(),
            containerd_version: "v2.3.4".to_owned(),
            containerd_ttrpc_address: "/run/containerd/containerd.sock.ttrpc".to_owned(),
            ..BootstrapParams::default()
        }
    }

    #[test]
    fn empty_input_of_1_7_is_a_request_without_options() {
        assert_eq!(parse(b"").unwrap(), StartRequest::default());
        assert_eq!(parse(b"").unwrap().version(), 2);
    }

    #[test]
    fn any_of_1_7_to_2_2_carries_the_options() {
        let request = parse(CTR).unwrap();
        assert_eq!(request.options.config_path.as_deref(), Some(Path::new("/etc/x.toml")));
        assert_eq!(request.version(), 2);
    }

    #[test]
    fn bootstrap_parameters_of_2_3_that_name_us_are_answered_with_version_3() {
        let mut parameters = parameters("c1", "default");
        parameters.socket_dir = Some("/run/s".to_owned());
        parameters.log_level = EnumOrUnknown::new(LogLevel::LOG_LEVEL_DEBUG);
        let other = Any {
            type_url: "some.Extension".to_owned(),
            value: b"\xff".to_vec(),
            ..Any::default()
        };
        for any in [Any::parse_from_bytes(CTR).unwrap(), other] {
            parameters.extensions.push(Extension {
                value: MessageField::some(any),
                ..Extension::default()
            });
        }
        let request = parse(&parameters.write_to_bytes().unwrap()).unwrap();
        let expected = StartRequest {
            bootstrap: true,
            options: Options {
                config_path: Some("/etc/x.toml".into()),
                ..Options::default()
            },
            socket_directory: Some("/run/s".into()),
            ttrpc_address: Some("/run/containerd/containerd.sock.ttrpc".to_owned()),
            debug: true,
        };
        assert_eq!(request, expected);
        assert_eq!(request.version(), 3);
    }

    #[test]
    fn log_levels_below_debug_are_debug_and_others_are_not() {
        for (level, debug) in [(-8, true), (-4, true), (-3, false), (0, false), (12, false)] {
            let mut parameters = parameters("c1", "default");
            parameters.log_level = EnumOrUnknown::from_i32(level);
            let request = parse(&parameters.write_to_bytes().unwrap()).unwrap();
            assert_eq!(request.debug, debug, "{level}");
        }
    }

    #[test]
    fn what_parses_as_both_forms_is_an_any_unless_it_names_us() {
        let confusable = Any {
            type_url: "c1".to_owned(),
            value: b"other".to_vec(),
            ..Any::default()
        };
        let bytes = confusable.write_to_bytes().unwrap();
        assert_eq!(BootstrapParams::parse_from_bytes(&bytes).unwrap().instance_id, "c1");
        assert_eq!(parse(&bytes).unwrap(), StartRequest::default());
        for (id, namespace) in [("c2", "default"), ("c1", "k8s.io")] {
            let bytes = parameters(id, namespace).write_to_bytes().unwrap();
            assert!(!parse(&bytes).unwrap().bootstrap, "{id} {namespace}");
        }
    }

    #[test]
    fn garbage_is_an_error() {
        for bytes in [
            &b"\xff\xff\xff\xff"[..],
            b"\n",
            b"{\"id\": \"c1\"}",
            b"\x0a\x19runtime",
            b"\x12\x01x",
        ] {
            assert!(matches!(parse(bytes), Err(BootstrapError::Input)), "{bytes:?}");
        }
    }

    #[test]
    fn group_is_ours_then_runcs_then_the_pods() {
        let ours = ("io.containerd.nutshell.v2.group", "a");
        let runcs = ("io.containerd.runc.v2.group", "b");
        let pods = ("io.kubernetes.cri.sandbox-id", "c");
        let named = |name: &str| Some(Group::Named(name.to_owned()));
        for (annotations, group) in [
            (vec![ours, runcs, pods], named("a")),
            (vec![pods, runcs], named("b")),
            (vec![pods], Some(Group::Pod("c".to_owned()))),
            (vec![(pods.0, "")], None),
            (vec![("other", "x")], None),
        ] {
            let annotations = annotations
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
            assert_eq!(Group::of(&annotations.collect()), group);
        }
    }

    #[test]
    fn configuration_is_the_path_or_the_text_of_the_options() {
        let bundle = tempfile::tempdir().unwrap();
        let body = |text: &str| Options {
            config_body: Some(text.to_owned()),
            ..Options::default()
        };
        let path = configuration(&body("debug = true"), bundle.path()).unwrap().unwrap();
        assert!(Configuration::load(Some(&path)).unwrap().debug);
        for named in ["relative.toml", "/no/such.toml"] {
            let options = Options {
                config_path: Some(named.into()),
                ..Options::default()
            };
            let error = configuration(&options, bundle.path()).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
            assert!(error.contains("ConfigPath"), "{error}");
        }
    }

    #[test]
    fn options_section_that_is_runcs_is_an_error_that_says_where_it_stands() {
        let bundle = tempfile::tempdir().unwrap();
        // As the CRI passes on what was copied from the section of runc.
        let options = Options {
            config_body: Some("BinaryName = \"\"\nSystemdCgroup = true\n".to_owned()),
            ..Options::default()
        };
        let error = configuration(&options, bundle.path()).unwrap_err().to_string();
        for named in [
            "BinaryName",
            "options of this runtime in containerd's configuration",
            "runc",
        ] {
            assert!(error.contains(named), "{error}");
        }
        assert!(!error.contains('\n'), "{error}");
    }
}
