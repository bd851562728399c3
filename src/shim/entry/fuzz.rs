//! The entry point of the fuzz target for what containerd passes to `start`.

#![allow(clippy::unwrap_used, reason = "a fuzz target fails by panic")]

use std::{ffi::OsString, os::unix::ffi::OsStringExt};

use super::{
    arguments::{self, Action, Target},
    start_request::StartRequest,
};

/// Parses `data` as a command line, which ends with a byte 0, and the standard input of `start`. The arguments end with
/// a line feed each.
///
/// # Panics
///
/// If an accepted command line has an id that is not one path component, or an answer of an unknown version.
pub fn parse_start_request(data: &[u8]) {
    let (line, request) = match data.iter().position(|byte| *byte == 0) {
        Some(end) => (&data[..end], &data[end + 1..]),
        None => (&[][..], data),
    };
    let arguments = line
        .split(|byte| *byte == b'\n')
        .map(|argument| OsString::from_vec(argument.to_vec()));
    let target = match arguments::parse(arguments) {
        Ok(Action::Start(target) | Action::Serve(target, _)) => target,
        _ => Target {
            id: "c1".parse().unwrap(),
            namespace: "default".to_owned(),
            address: "/run/containerd/containerd.sock".to_owned(),
            publish_binary: None,
            debug: false,
        },
    };
    let id = target.id.as_str();
    assert!(!id.is_empty() && !id.contains('/') && id != "." && id != "..", "{id:?}");
    assert!(!target.namespace.is_empty());
    if let Ok(request) = StartRequest::parse(request, &target) {
        assert!([2, 3].contains(&request.answer_version()));
    }
}
