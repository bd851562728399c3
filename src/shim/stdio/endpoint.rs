//! What containerd's names for streams mean (containerd `pkg/cio`, and the runc shim's `process/io.go`).

use std::{ffi::OsString, os::unix::ffi::OsStringExt, path::PathBuf};

use percent_encoding::percent_decode_str;

use super::StdioError;

/// The schemes that are understood, besides a plain path, which is a fifo.
const KNOWN: &str = "fifo, file, binary, binary-v2 and ttrpc+unix";

/// A stream's endpoint on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Endpoint {
    /// A named pipe.
    Fifo(PathBuf),
    /// A file, appended to, made with its folder if it is not there.
    Log(PathBuf),
    /// A program that takes the output.
    Program(Program),
    /// The stream with this id that a client opens at the shim's own socket.
    Streaming(String),
}

/// A logging program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Program {
    /// The executable.
    pub(super) path: PathBuf,
    /// Its arguments: each key of the query, followed by its first value.
    pub(super) arguments: Vec<String>,
    /// It must say that it is ready; the end of what it could say it with is not enough.
    pub(super) must_say_ready: bool,
}

impl Endpoint {
    /// Parses what containerd calls `stream` (`stdin`, `stdout`, `stderr`). `None` where there is none.
    pub(super) fn parse(stream: &'static str, uri: &str) -> Result<Option<Self>, StdioError> {
        let unsupported = |reason: String| StdioError::Unsupported {
            stream,
            uri: uri.to_owned(),
            reason,
        };
        if uri.is_empty() {
            return Ok(None);
        }
        let Some((scheme, rest)) = uri.split_once("://") else {
            // A path as it is, not a URI: nothing in it is encoded.
            let path = PathBuf::from(uri);
            return match path.is_absolute() {
                true => Ok(Some(Self::Fifo(path))),
                false => Err(unsupported("not an absolute path".to_owned())),
            };
        };
        let (rest, _fragment) = rest.split_once('#').unwrap_or((rest, ""));
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path = PathBuf::from(OsString::from_vec(percent_decode_str(path).collect()));
        let has_path = || match path.is_absolute() {
            true => Ok(path.clone()),
            false => Err(unsupported("not an absolute path".to_owned())),
        };
        Ok(Some(match scheme {
            "fifo" => Self::Fifo(has_path()?),
            "file" => Self::Log(has_path()?),
            "binary" | "binary-v2" => Self::Program(Program {
                path: has_path()?,
                arguments: arguments(query),
                must_say_ready: scheme == "binary-v2",
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
            _ => return Err(unsupported(format!("this kind of stream is not one of {KNOWN}"))),
        }))
    }

    /// Whether standard error goes here too if nothing else is said of it, as with runc.
    pub(super) fn takes_both(&self) -> bool {
        matches!(self, Self::Log(_) | Self::Program(_))
    }
}

/// As containerd makes them of a query (`process/utils`, `NewBinaryCmd`); there their order is left to
/// chance, here it is the query's.
fn arguments(query: &str) -> Vec<String> {
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

    fn parse(uri: &str) -> Result<Option<Endpoint>, StdioError> {
        Endpoint::parse("stdout", uri)
    }

    #[test]
    fn names_of_streams_are_told_apart() {
        let program = |path: &str, arguments: &[&str], must_say_ready| {
            Endpoint::Program(Program {
                path: path.into(),
                arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
                must_say_ready,
            })
        };
        for (uri, endpoint) in [
            ("/a b", Endpoint::Fifo("/a b".into())),
            ("/a%20?b#c", Endpoint::Fifo("/a%20?b#c".into())),
            ("fifo:///a", Endpoint::Fifo("/a".into())),
            ("file:///var/log/x", Endpoint::Log("/var/log/x".into())),
            ("file:///a%20b?max=1#x", Endpoint::Log("/a b".into())),
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
    fn names_that_mean_nothing_are_refused_by_name() {
        for (bad, reason) in [
            ("relative", "absolute"),
            ("file://relative", "absolute"),
            ("binary://logger?a=b", "absolute"),
            ("ttrpc+unix:///s", "streaming_id"),
            ("ttrpc+vsock://3:5?streaming_id=x", "io_type"),
            ("grpc+unix:///s?streaming_id=x", "io_type"),
            ("gopher:///x", "binary-v2"),
        ] {
            let error = parse(bad).unwrap_err().to_string();
            assert!(error.contains("stdout") && error.contains(bad), "{error}");
            assert!(error.contains(reason), "{error}");
        }
    }
}
