//! The command line, as containerd writes it for shims made with Go's `flag` package: one or two
//! dashes, `-name value` or `-name=value`, then the action (containerd `core/runtime/v2/README.md`, `pkg/shim`).

use std::{ffi::OsString, path::PathBuf};

use crate::oci::{ContainerId, IdError};

/// What the shim is asked to do.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// `-v`: print the version.
    Version,
    /// `-info`: print what the runtime can do.
    Info,
    /// `start`: make sure that a shim serves, print its address.
    Start(Target),
    /// `delete`: clean up after the container with the bundle that `-bundle` names.
    Delete(Option<PathBuf>),
    /// Nothing named: be that shim.
    Serve(Target, Serve),
}

/// The container that an action is for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Target {
    /// Its id.
    pub(crate) id: ContainerId,
    /// Its namespace.
    pub(crate) namespace: String,
    /// containerd's gRPC address.
    pub(crate) address: String,
    /// containerd's executable.
    pub(crate) publish_binary: Option<PathBuf>,
    /// Log debug messages.
    pub(crate) debug: bool,
}

/// What `start` tells the shim that it starts.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Serve {
    /// The path of the socket that is passed.
    pub(crate) socket: PathBuf,
    /// The configuration to use instead of the default one.
    pub(crate) configuration: Option<PathBuf>,
}

/// What is wrong with the command line.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum ArgumentsError {
    /// Not Unicode.
    #[error("argument {0:?} is not valid UTF-8")]
    NotUnicode(OsString),
    /// No flag of a shim.
    #[error("flag provided but not defined: -{0}")]
    Unknown(String),
    /// The last argument is a flag that needs one more.
    #[error("flag needs an argument: -{0}")]
    NoValue(String),
    /// A flag that is on or off has another value.
    #[error("invalid boolean value {value:?} for -{flag}")]
    NotBoolean {
        /// The flag.
        flag: String,
        /// Its value.
        value: String,
    },
    /// An action that needs a flag came without.
    #[error("-{0} is required")]
    Missing(&'static str),
    /// An action of nobody.
    #[error("unknown action {0:?}: start, delete or none")]
    Action(String),
    /// The id is none.
    #[error("-id: {0}")]
    Id(#[from] IdError),
}

/// Parses the arguments after the program's name.
pub(crate) fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Action, ArgumentsError> {
    let mut arguments = arguments.map(|argument| argument.into_string().map_err(ArgumentsError::NotUnicode));
    let mut flags = Flags::default();
    let action = loop {
        let Some(argument) = arguments.next().transpose()? else {
            break None;
        };
        if argument == "--" {
            break arguments.next().transpose()?;
        }
        let Some(flag) = argument.strip_prefix("--").or_else(|| argument.strip_prefix('-')) else {
            break Some(argument);
        };
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        if let Some(switch) = flags.switch(name) {
            *switch = boolean(name, value)?;
        } else if let Some(text) = flags.text(name) {
            let next = || {
                arguments
                    .next()
                    .unwrap_or_else(|| Err(ArgumentsError::NoValue(name.to_owned())))
            };
            *text = value.map_or_else(next, Ok)?;
        } else {
            return Err(ArgumentsError::Unknown(name.to_owned()));
        }
    };
    flags.action(action.as_deref())
}

fn boolean(flag: &str, value: Option<String>) -> Result<bool, ArgumentsError> {
    match value.as_deref() {
        None | Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(true),
        Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(false),
        Some(value) => Err(ArgumentsError::NotBoolean {
            flag: flag.to_owned(),
            value: value.to_owned(),
        }),
    }
}

#[derive(Default)]
struct Flags {
    debug: bool,
    version: bool,
    info: bool,
    id: String,
    namespace: String,
    address: String,
    publish_binary: String,
    bundle: String,
    socket: String,
    configuration: String,
}

impl Flags {
    fn switch(&mut self, name: &str) -> Option<&mut bool> {
        match name {
            "debug" => Some(&mut self.debug),
            "v" | "version" => Some(&mut self.version),
            "info" => Some(&mut self.info),
            _ => None,
        }
    }

    fn text(&mut self, name: &str) -> Option<&mut String> {
        match name {
            "id" => Some(&mut self.id),
            "namespace" => Some(&mut self.namespace),
            "address" => Some(&mut self.address),
            "publish-binary" => Some(&mut self.publish_binary),
            "bundle" => Some(&mut self.bundle),
            "socket" => Some(&mut self.socket),
            "configuration" => Some(&mut self.configuration),
            _ => None,
        }
    }

    fn action(self, action: Option<&str>) -> Result<Action, ArgumentsError> {
        if self.version {
            return Ok(Action::Version);
        }
        if self.info {
            return Ok(Action::Info);
        }
        let path = |text: &str| (!text.is_empty()).then(|| PathBuf::from(text));
        let bundle = path(&self.bundle);
        let serve = path(&self.socket).map(|socket| Serve {
            socket,
            configuration: path(&self.configuration),
        });
        match action {
            Some("start") => Ok(Action::Start(self.target()?)),
            Some("delete") => Ok(Action::Delete(bundle)),
            None => Ok(Action::Serve(
                self.target()?,
                serve.ok_or(ArgumentsError::Missing("socket"))?,
            )),
            Some(other) => Err(ArgumentsError::Action(other.to_owned())),
        }
    }

    fn target(self) -> Result<Target, ArgumentsError> {
        if self.namespace.is_empty() {
            return Err(ArgumentsError::Missing("namespace"));
        }
        if self.id.is_empty() {
            return Err(ArgumentsError::Missing("id"));
        }
        Ok(Target {
            id: self.id.parse()?,
            namespace: self.namespace,
            address: self.address,
            publish_binary: Some(self.publish_binary)
                .filter(|path| !path.is_empty())
                .map(PathBuf::from),
            debug: self.debug,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Action, ArgumentsError> {
        parse(line.split_whitespace().map(OsString::from))
    }

    fn target() -> Target {
        Target {
            id: "c1".parse().unwrap(),
            namespace: "default".to_owned(),
            address: "/run/containerd/containerd.sock".to_owned(),
            publish_binary: Some("/usr/bin/containerd".into()),
            debug: false,
        }
    }

    const CONTAINERD: &str =
        "-namespace default -address /run/containerd/containerd.sock -publish-binary /usr/bin/containerd -id c1";

    #[test]
    fn start_is_parsed_however_the_flags_are_written() {
        for line in [
            format!("{CONTAINERD} start"),
            format!("{CONTAINERD} -debug=false start"),
            CONTAINERD.replace('-', "--").replace("publish--binary", "publish-binary") + " start",
            "--namespace=default -address=/run/containerd/containerd.sock -id=c1 --publish-binary=/usr/bin/containerd start"
                .to_owned(),
            format!("{CONTAINERD} -- start"),
            format!("{CONTAINERD} start ignored"),
        ] {
            assert_eq!(parsed(&line), Ok(Action::Start(target())), "{line}");
        }
        let debug = Target {
            debug: true,
            ..target()
        };
        assert_eq!(parsed(&format!("{CONTAINERD} -debug start")), Ok(Action::Start(debug)));
    }

    #[test]
    fn delete_has_a_bundle_and_serve_a_socket() {
        let line = format!("{CONTAINERD} -bundle /run/b delete");
        assert_eq!(parsed(&line), Ok(Action::Delete(Some("/run/b".into()))));
        assert_eq!(parsed(&format!("{CONTAINERD} delete")), Ok(Action::Delete(None)));
        let serve = Serve {
            socket: "/run/s/1".into(),
            configuration: Some("/etc/n.toml".into()),
        };
        let line = format!("{CONTAINERD} -socket /run/s/1 -configuration /etc/n.toml");
        assert_eq!(parsed(&line), Ok(Action::Serve(target(), serve)));
    }

    #[test]
    fn information_needs_nothing_else() {
        for (line, action) in [
            ("-v", Action::Version),
            ("--version", Action::Version),
            ("-info", Action::Info),
            ("-debug -info", Action::Info),
        ] {
            assert_eq!(parsed(line), Ok(action));
        }
    }

    #[test]
    fn what_cannot_be_meant_is_an_error_that_names_it() {
        for (line, named) in [
            ("-namespace n -id c1 -colour red start", "-colour"),
            ("-namespace n -id", "-id"),
            ("-namespace n -id c1 -debug=maybe start", "maybe"),
            ("-id c1 start", "-namespace"),
            ("-namespace n start", "-id"),
            ("-namespace n -id ../c1 start", "../c1"),
            ("-namespace n -id c1 restart", "restart"),
            ("-namespace n -id c1", "-socket"),
        ] {
            let error = parsed(line).unwrap_err();
            assert!(error.to_string().contains(named), "{line}: {error}");
        }
    }
}
