//! The entry point of the fuzz target for what containerd passes to `start`.

#![allow(clippy::unwrap_used, reason = "a fuzz target fails by panic")]

use std::{ffi::OsString, os::unix::ffi::OsStringExt};

use super::{
    arguments::{self, Action, Target},
    start_request::StartRequest,
};

/// Parses `data`: a command line, a byte 0, and the standard input of `start`. Line feeds separate the arguments. Without
/// a byte 0, all of `data` is the standard input, and the command line is empty.
///
/// # Panics
///
/// If an accepted command line has an empty namespace or an id that is not one path component, or if an accepted request
/// asks for an answer of a version other than 2 and 3.
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
        // A valid target, so that the request is parsed nevertheless.
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
