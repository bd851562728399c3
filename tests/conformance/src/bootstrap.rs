//! The input of `start` from each version of containerd, and how each reads the answer.

use std::path::{Path, PathBuf};

use containerd_shim_protos::{
    bootstrap_api::{BootstrapParams, BootstrapResult, Extension, LogLevel},
    protobuf::{EnumOrUnknown, Message, MessageField, well_known_types::any::Any},
};
use serde_json::Value;

/// A version of containerd that calls `start`.
#[derive(Debug, Clone)]
pub enum Caller {
    /// 1.7: accepts a plain address, or JSON with version 2. The value is the runtime options on standard input.
    V1_7(Option<Any>),
    /// 2.0 to 2.2: accepts version 3 too.
    V2_2(Option<Any>),
    /// 2.3 and later: always sends `BootstrapParams` on standard input, and accepts protobuf too.
    V2_3 {
        /// The runtime options.
        options: Option<Any>,
        /// The folder for the socket.
        socket_directory: Option<PathBuf>,
    },
}

impl Caller {
    /// The newest version, without options.
    pub fn newest() -> Self {
        Self::V2_3 {
            options: None,
            socket_directory: None,
        }
    }

    /// The bytes on standard input of `start`; `None` means `/dev/null`.
    pub fn input(&self, namespace: &str, id: &str, ttrpc_address: &Path, address: &Path) -> Option<Vec<u8>> {
        match self {
            Self::V1_7(options) | Self::V2_2(options) => options.as_ref().map(|any| any.write_to_bytes().unwrap()),
            Self::V2_3 {
                options,
                socket_directory,
            } => {
                let extension = |any: &Any| Extension {
                    value: MessageField::some(any.clone()),
                    ..Extension::default()
                };
                let parameters = BootstrapParams {
                    instance_id: id.to_owned(),
                    namespace: namespace.to_owned(),
                    log_level: EnumOrUnknown::new(LogLevel::LOG_LEVEL_DEBUG),
                    containerd_version: "2.3.4".to_owned(),
                    containerd_ttrpc_address: ttrpc_address.display().to_string(),
                    containerd_grpc_address: address.display().to_string(),
                    containerd_binary: "/usr/bin/containerd".to_owned(),
                    extensions: options.iter().map(extension).collect(),
                    socket_dir: socket_directory.as_ref().map(|path| path.display().to_string()),
                    ..BootstrapParams::default()
                };
                Some(parameters.write_to_bytes().unwrap())
            }
        }
    }

    /// Parses the answer of `start` as this version of containerd does.
    ///
    /// # Errors
    ///
    /// The reason why containerd would refuse the answer.
    pub fn parse_answer(&self, answer: &[u8]) -> Result<StartAnswer, String> {
        let newest = match self {
            Self::V1_7(_) => 2,
            Self::V2_2(_) | Self::V2_3 { .. } => 3,
        };
        let protobuf = match self {
            // Rust's parser accepts an end-group tag with a wrong field number, Go's refuses it. To refuse it here too,
            // accept only a message that serializes to the same bytes again: with a wrong tag it does not.
            Self::V2_3 { .. } => BootstrapResult::parse_from_bytes(answer)
                .ok()
                .filter(|result| result.write_to_bytes().is_ok_and(|bytes| bytes == answer)),
            Self::V1_7(_) | Self::V2_2(_) => None,
        };
        let answer = match protobuf {
            Some(result) => StartAnswer {
                version: i64::from(result.version),
                address: result.address,
                protocol: result.protocol,
            },
            None => StartAnswer::from_text(answer)?,
        };
        if answer.version > newest {
            return Err(format!("unsupported shim version ({})", answer.version));
        }
        if answer.protocol != "ttrpc" {
            return Err(format!("unsupported protocol {:?}", answer.protocol));
        }
        Ok(answer)
    }
}

/// The answer of `start`: where the shim serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StartAnswer {
    /// The version of the Task service.
    pub version: i64,
    /// `unix://` followed by the path of the socket.
    pub address: String,
    /// The protocol, always `ttrpc`.
    pub protocol: String,
}

impl StartAnswer {
    fn from_text(text: &[u8]) -> Result<Self, String> {
        let text =
            String::from_utf8(text.to_vec()).map_err(|error| format!("the answer of start is not UTF-8: {error}"))?;
        let Ok(json) = serde_json::from_str::<Value>(&text) else {
            return Ok(Self {
                version: 2,
                address: text,
                protocol: "ttrpc".to_owned(),
            });
        };
        let field = |name| {
            json[name]
                .as_str()
                .map(str::to_owned)
                .ok_or(format!("the answer of start has no string {name}: {text}"))
        };
        Ok(Self {
            version: json["version"]
                .as_i64()
                .ok_or(format!("the answer of start has no integer version: {text}"))?,
            address: field("address")?,
            protocol: field("protocol")?,
        })
    }

    /// The path of the socket.
    ///
    /// # Panics
    ///
    /// If the address is not a unix address.
    pub fn socket(&self) -> PathBuf {
        PathBuf::from(self.address.strip_prefix("unix://").expect("a unix address"))
    }
}

/// Runtime options, as a client of containerd encodes them.
pub fn options(type_url: &str, value: &[u8]) -> Any {
    Any {
        type_url: type_url.to_owned(),
        value: value.to_vec(),
        ..Any::default()
    }
}
