//! The request that containerd passes to `start` on standard input.

use std::{
    io::{self, IsTerminal, Read},
    path::PathBuf,
};

use containerd_shim::protos::{
    bootstrap_api::{BootstrapParams, LogLevel},
    protobuf::{Enum, Message, well_known_types::any::Any},
};

use super::{
    arguments::Target,
    options::{Options, OptionsError},
};

/// Maximum length of standard input, in bytes. This is containerd's own limit for a message, so no request is longer.
const MAX_INPUT: u64 = 4 << 20;

/// A request that cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartRequestError {
    /// Standard input holds neither form of the request.
    #[error("standard input is neither a BootstrapParams nor an Any of runtime options")]
    Malformed,
    /// Standard input is too long.
    #[error("standard input is longer than {MAX_INPUT} bytes")]
    TooLong,
    /// The runtime options cannot be decoded.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// Standard input cannot be read.
    #[error("cannot read standard input: {0}")]
    Unreadable(#[source] io::Error),
}

/// The parameters that containerd passes in addition to the command line.
#[derive(Debug, Default, PartialEq)]
pub(super) struct StartRequest {
    /// The request was a `BootstrapParams`: containerd is 2.3 or later.
    bootstrap: bool,
    /// The runtime options.
    pub(super) options: Options,
    /// The directory for the socket, instead of the default one.
    pub(super) socket_directory: Option<PathBuf>,
    /// The address of containerd's ttrpc socket.
    pub(super) ttrpc_address: Option<String>,
    /// Log debug messages.
    pub(super) debug: bool,
}

impl StartRequest {
    /// Reads the request for `target` from standard input. A terminal counts as empty input.
    pub(super) fn read(target: &Target) -> Result<Self, StartRequestError> {
        Self::parse(&read_input()?, target)
    }

    /// Standard input is empty, an `Any` of runtime options (up to containerd 2.2), or a
    /// `BootstrapParams` (2.3 and later). The fields of the last two overlap on the wire. A
    /// `BootstrapParams` is recognized by its id and namespace, which repeat the command line.
    pub(super) fn parse(bytes: &[u8], target: &Target) -> Result<Self, StartRequestError> {
        if bytes.is_empty() {
            return Ok(Self::default());
        }
        let parameters = BootstrapParams::parse_from_bytes(bytes).ok().filter(|parameters| {
            parameters.instance_id == target.id.as_str() && parameters.namespace == target.namespace
        });
        match parameters {
            Some(parameters) => Self::from_parameters(&parameters),
            None => Ok(Self {
                options: Options::decode(&parse_any(bytes).ok_or(StartRequestError::Malformed)?)?,
                ..Self::default()
            }),
        }
    }

    fn from_parameters(parameters: &BootstrapParams) -> Result<Self, StartRequestError> {
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

    /// The version of the answer: containerd before 2.0 rejects 3, all versions accept 2
    /// (containerd `core/runtime/v2/shim.go`).
    pub(super) fn answer_version(&self) -> u32 {
        if self.bootstrap { 3 } else { 2 }
    }
}

fn read_input() -> Result<Vec<u8>, StartRequestError> {
    let stdin = io::stdin();
    let mut bytes = Vec::new();
    if stdin.is_terminal() {
        return Ok(bytes);
    }
    stdin
        .take(MAX_INPUT + 1)
        .read_to_end(&mut bytes)
        .map_err(StartRequestError::Unreadable)?;
    if bytes.len() as u64 > MAX_INPUT {
        return Err(StartRequestError::TooLong);
    }
    Ok(bytes)
}

fn parse_any(bytes: &[u8]) -> Option<Any> {
    Any::parse_from_bytes(bytes).ok().filter(|any| !any.type_url.is_empty())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use containerd_shim::protos::{
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

    fn parse(bytes: &[u8]) -> Result<StartRequest, StartRequestError> {
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
    fn empty_input_of_containerd_1_7_is_a_request_without_options() {
        assert_eq!(parse(b"").unwrap(), StartRequest::default());
        assert_eq!(parse(b"").unwrap().answer_version(), 2);
    }

    #[test]
    fn any_of_containerd_1_7_to_2_2_carries_the_options() {
        let request = parse(CTR).unwrap();
        assert_eq!(request.options.config_path.as_deref(), Some(Path::new("/etc/x.toml")));
        assert_eq!(request.answer_version(), 2);
    }

    #[test]
    fn bootstrap_parameters_of_containerd_2_3_are_answered_with_version_3() {
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
        assert_eq!(request.answer_version(), 3);
    }

    #[test]
    fn log_levels_up_to_debug_enable_debug_messages() {
        for (level, debug) in [(-8, true), (-4, true), (-3, false), (0, false), (12, false)] {
            let mut parameters = parameters("c1", "default");
            parameters.log_level = EnumOrUnknown::from_i32(level);
            let request = parse(&parameters.write_to_bytes().unwrap()).unwrap();
            assert_eq!(request.debug, debug, "{level}");
        }
    }

    #[test]
    fn ambiguous_input_is_an_any_unless_its_id_and_namespace_match() {
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
            assert!(matches!(parse(bytes), Err(StartRequestError::Malformed)), "{bytes:?}");
        }
    }
}
