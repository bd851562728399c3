//! The runtime options that containerd's clients pass: an `Any`, which is decoded by its type. `ctr` and the CRI send
//! the generic options (containerd `api/types/runtimeoptions/v1`). moby and nerdctl may send runc's.

use std::path::PathBuf;

use containerd_shim::protos::{
    protobuf::{self, CodedInputStream, Message, well_known_types::any::Any},
    shim::oci,
};

/// The options that this runtime uses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Options {
    /// The path of the runtime's configuration.
    pub(crate) config_path: Option<PathBuf>,
    /// The runtime's configuration itself. Ignored if there is a `config_path`.
    pub(crate) config_body: Option<String>,
    pub(crate) shim_cgroup: Option<String>,
}

/// Options that cannot be decoded as their type.
#[derive(Debug, thiserror::Error)]
#[error("runtime options of type {kind}: {source}")]
pub(crate) struct OptionsError {
    kind: &'static str,
    source: protobuf::Error,
}

const GENERIC: &str = "runtimeoptions.v1.Options";
const RUNC: &str = "containerd.runc.v1.Options";

impl Options {
    /// Decodes options of a known type. Those of any other type are ignored.
    pub(crate) fn decode(any: &Any) -> Result<Self, OptionsError> {
        // A type URL may have a prefix before the name (protobuf, `Any`).
        match any.type_url.rsplit('/').next() {
            Some(GENERIC) => Self::decode_generic(&any.value).map_err(|source| OptionsError { kind: GENERIC, source }),
            Some(RUNC) => Self::decode_runc(&any.value).map_err(|source| OptionsError { kind: RUNC, source }),
            _ => Ok(Self::default()),
        }
    }

    /// containerd `api/types/runtimeoptions/v1/api.proto`: 1 type_url, 2 config_path, 3 config_body.
    fn decode_generic(bytes: &[u8]) -> protobuf::Result<Self> {
        let mut options = Self::default();
        let mut stream = CodedInputStream::from_bytes(bytes);
        while let Some(tag) = stream.read_raw_tag_or_eof()? {
            match tag {
                18 => options.config_path = non_empty(stream.read_string()?).map(PathBuf::from),
                26 => options.config_body = non_empty(to_utf8(stream.read_bytes()?)?),
                tag => protobuf::rt::skip_field_for_tag(tag, &mut stream)?,
            }
        }
        Ok(options)
    }

    fn decode_runc(bytes: &[u8]) -> protobuf::Result<Self> {
        let options = oci::Options::parse_from_bytes(bytes)?;
        Ok(Self {
            shim_cgroup: non_empty(options.shim_cgroup),
            ..Self::default()
        })
    }
}

fn to_utf8(bytes: Vec<u8>) -> protobuf::Result<String> {
    String::from_utf8(bytes).map_err(|error| std::io::Error::other(error).into())
}

/// In protobuf 3, an empty string means that the field is not set.
fn non_empty(text: String) -> Option<String> {
    Some(text).filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(type_url: &str, value: &[u8]) -> Any {
        Any {
            type_url: type_url.to_owned(),
            value: value.to_vec(),
            ..Any::default()
        }
    }

    #[test]
    fn path_and_body_of_generic_options_are_decoded() {
        let ctr = any(GENERIC, b"\x12\x0b/etc/x.toml");
        let expected = Options {
            config_path: Some("/etc/x.toml".into()),
            ..Options::default()
        };
        assert_eq!(Options::decode(&ctr).unwrap(), expected);
        let cri = any(
            &format!("type.googleapis.com/{GENERIC}"),
            b"\x0a\x03abc\x1a\x0cdebug = true",
        );
        assert_eq!(
            Options::decode(&cri).unwrap().config_body.as_deref(),
            Some("debug = true")
        );
    }

    #[test]
    fn malformed_options_of_a_known_type_are_an_error_that_names_the_type() {
        for (type_url, value) in [
            (GENERIC, &b"\x1a\x0ddebug = true"[..]),
            (GENERIC, b"\x1a\x01\xff"),
            (RUNC, b"\x1a\x09x"),
        ] {
            let error = Options::decode(&any(type_url, value)).unwrap_err();
            assert!(error.to_string().contains(type_url), "{error}");
        }
    }

    #[test]
    fn cgroup_of_runc_options_is_decoded() {
        let options = oci::Options {
            shim_cgroup: "/shims".to_owned(),
            binary_name: "crun".to_owned(),
            ..oci::Options::default()
        };
        let decoded = Options::decode(&any(RUNC, &options.write_to_bytes().unwrap())).unwrap();
        let expected = Options {
            shim_cgroup: Some("/shims".to_owned()),
            ..Options::default()
        };
        assert_eq!(decoded, expected);
    }

    #[test]
    fn options_of_another_type_are_ignored() {
        for type_url in ["", "containerd.runhcs.v1.Options", "runtimeoptions.v2.Options"] {
            assert_eq!(
                Options::decode(&any(type_url, b"\xff\xff")).unwrap(),
                Options::default()
            );
        }
    }
}
