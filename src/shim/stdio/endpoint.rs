//! Parses the names of streams in containerd's requests (containerd `pkg/cio`, and the runc shim's `process/io.go`).

use std::{ffi::OsString, os::unix::ffi::OsStringExt, path::PathBuf};

use percent_encoding::percent_decode_str;

/// The supported schemes, for error messages. A plain path is a fifo too.
const SUPPORTED_SCHEMES: &str = "fifo, file, binary, binary-v2 and ttrpc+unix";

/// A name that is not supported.
#[derive(Debug, thiserror::Error)]
#[error("{stream} {uri}: {reason}")]
pub(crate) struct EndpointError {
    /// `stdin`, `stdout` or `stderr`.
    pub(super) stream: &'static str,
    pub(super) uri: String,
    pub(super) reason: String,
}

/// The host's end of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Endpoint {
    /// A named pipe.
    Fifo(PathBuf),
    /// A file that is appended to, and created with its parent directories if it is missing.
    File(PathBuf),
    /// A logging program that reads the output.
    Program(Program),
    /// The stream with this id, which a client opens at the shim's socket.
    Streaming(String),
}

/// A logging program to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Program {
    /// The executable.
    pub(super) path: PathBuf,
    /// Each key of the query, followed by its first value.
    pub(super) arguments: Vec<String>,
    /// The program must write a byte when it is ready (`binary-v2`). Otherwise it may also close its descriptor 5.
    pub(super) must_report_ready: bool,
}

impl Endpoint {
    /// Parses the name of `stream` (`stdin`, `stdout`, `stderr`). `None` if it is empty: the process has no such
    /// stream.
    pub(super) fn parse(stream: &'static str, uri: &str) -> Result<Option<Self>, EndpointError> {
        let unsupported = |reason: String| EndpointError {
            stream,
            uri: uri.to_owned(),
            reason,
        };
        if uri.is_empty() {
            return Ok(None);
        }
        let Some((scheme, rest)) = uri.split_once("://") else {
            // A plain path, which is not percent-encoded.
            let path = PathBuf::from(uri);
            return match path.is_absolute() {
                true => Ok(Some(Self::Fifo(path))),
                false => Err(unsupported("not an absolute path".to_owned())),
            };
        };
        let (rest, _fragment) = rest.split_once('#').unwrap_or((rest, ""));
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path = PathBuf::from(OsString::from_vec(percent_decode_str(path).collect()));
        let absolute_path = || match path.is_absolute() {
            true => Ok(path.clone()),
            false => Err(unsupported("not an absolute path".to_owned())),
        };
        Ok(Some(match scheme {
            "fifo" => Self::Fifo(absolute_path()?),
            "file" => Self::File(absolute_path()?),
            "binary" | "binary-v2" => Self::Program(Program {
                path: absolute_path()?,
                arguments: parse_arguments(query),
                must_report_ready: scheme == "binary-v2",
            }),
            "ttrpc+unix" => {
                let id = form_urlencoded::parse(query.as_bytes()).find(|(key, _)| key == "streaming_id");
                let id = id.ok_or_else(|| unsupported("it has no streaming_id".to_owned()))?;
                Self::Streaming(id.1.into_owned())
            }
            _ if scheme.starts_with("grpc+") || scheme.starts_with("ttrpc+") => {
                return Err(unsupported(
                    "streams are served by ttrpc on the shim's own socket (ttrpc+unix) only: \
                     remove io_type from the runtime's section of containerd's configuration to use fifos"
                        .to_owned(),
                ));
            }
            _ => return Err(unsupported(format!("the scheme is not one of {SUPPORTED_SCHEMES}"))),
        }))
    }

    /// Whether standard error also goes to this endpoint of standard output if it has no endpoint itself, as with runc.
    pub(super) fn is_default_for_stderr(&self) -> bool {
        matches!(self, Self::File(_) | Self::Program(_))
    }
}

/// The arguments that containerd makes from a query (`process/utils`, `NewBinaryCmd`). Their order is random there;
/// here it is that of the query.
fn parse_arguments(query: &str) -> Vec<String> {
    let mut seen = Vec::<String>::new();
    let mut arguments = Vec::new();
    for (key, value) in form_urlencoded::parse(query.as_bytes()) {
        if !seen.iter().any(|known| *known == key) {
            seen.push(key.to_string());
            arguments.extend([key.into_owned(), value.into_owned()]);
        }
    }
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(uri: &str) -> Result<Option<Endpoint>, EndpointError> {
        Endpoint::parse("stdout", uri)
    }

    #[test]
    fn supported_names_are_parsed() {
        let program = |path: &str, arguments: &[&str], must_report_ready| {
            Endpoint::Program(Program {
                path: path.into(),
                arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
                must_report_ready,
            })
        };
        for (uri, endpoint) in [
            ("/a b", Endpoint::Fifo("/a b".into())),
            ("/a%20?b#c", Endpoint::Fifo("/a%20?b#c".into())),
            ("fifo:///a", Endpoint::Fifo("/a".into())),
            ("file:///var/log/x", Endpoint::File("/var/log/x".into())),
            ("file:///a%20b?max=1#x", Endpoint::File("/a b".into())),
            ("binary:///bin/logger", program("/bin/logger", &[], false)),
            (
                "binary:///bin/log%67er?id=1&empty&text=a+b%26c&id=2",
                program("/bin/logger", &["id", "1", "empty", "", "text", "a b&c"], false),
            ),
            ("binary-v2:///bin/logger?a=b", program("/bin/logger", &["a", "b"], true)),
            (
                "ttrpc+unix:///run/containerd/s/1234?streaming_id=c1-stdout",
                Endpoint::Streaming("c1-stdout".to_owned()),
            ),
        ] {
            assert_eq!(parse(uri).unwrap(), Some(endpoint), "{uri}");
        }
        assert_eq!(parse("").unwrap(), None);
    }

    #[test]
    fn unsupported_names_are_errors_with_stream_name_and_reason() {
        for (uri, reason) in [
            ("relative", "absolute"),
            ("file://relative", "absolute"),
            ("binary://logger?a=b", "absolute"),
            ("ttrpc+unix:///s", "streaming_id"),
            ("ttrpc+vsock://3:5?streaming_id=x", "io_type"),
            ("grpc+unix:///s?streaming_id=x", "io_type"),
            ("gopher:///x", "binary-v2"),
        ] {
            let error = parse(uri).unwrap_err().to_string();
            assert!(error.contains("stdout") && error.contains(uri), "{error}");
            assert!(error.contains(reason), "{error}");
        }
    }
}
