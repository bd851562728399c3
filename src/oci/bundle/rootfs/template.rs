//! Templates in the mounts that containerd's EROFS snapshotter returns (containerd, `core/mount/manager/format.go`).
//!
//! A string of a mount whose type starts with `format/` is a template of Go's package `text/template`. Its functions
//! name the mount points of earlier mounts: `{{ mount 0 }}`, and `{{ overlay 1 3 }}` for several, joined by colons. The
//! functions `source` and `target` name paths of the host, which have no meaning in the guest.

use std::path::{Component, Path};

use nutshell_protocol::LayerPath;

/// Why a template does not name paths in layers.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum TemplateError {
    #[error("{0:?} is not a template that containerd's snapshotters use")]
    Syntax(String),
    #[error("it names mount {0}, and only earlier mounts can be named")]
    NoSuchMount(u64),
    #[error("{0:?} is a path of the host")]
    HostPath(String),
    #[error("{0:?} is not a path below a mount")]
    Path(String),
}

/// Parses one path. `layers` is the number of mounts that it can name.
pub(super) fn parse_path(text: &str, layers: u32) -> Result<LayerPath, TemplateError> {
    let mut paths = parse_paths(text, layers)?;
    match (paths.pop(), paths.is_empty()) {
        (Some(path), true) => Ok(path),
        _ => Err(TemplateError::Syntax(text.to_owned())),
    }
}

/// Parses paths that are separated by colons.
pub(super) fn parse_paths(text: &str, layers: u32) -> Result<Vec<LayerPath>, TemplateError> {
    let mut paths = Vec::new();
    let mut rest = text;
    loop {
        let Some(template) = rest.strip_prefix("{{") else {
            return Err(match rest.contains("{{") || rest.is_empty() {
                true => TemplateError::Syntax(text.to_owned()),
                false => TemplateError::HostPath(rest.to_owned()),
            });
        };
        let (call, after) = template
            .split_once("}}")
            .ok_or_else(|| TemplateError::Syntax(text.to_owned()))?;
        let (suffix, next) = match after.split_once(':') {
            Some((suffix, next)) => (suffix, Some(next)),
            None => (after, None),
        };
        let mut named = parse_call(call, layers)?.ok_or_else(|| TemplateError::Syntax(text.to_owned()))?;
        if let Some(last) = named.last_mut() {
            last.path = parse_suffix(suffix)?;
        }
        paths.append(&mut named);
        match next {
            Some(next) => rest = next,
            None => return Ok(paths),
        }
    }
}

/// Parses what stands between the braces. `None` if it is not one of the functions.
fn parse_call(call: &str, layers: u32) -> Result<Option<Vec<LayerPath>>, TemplateError> {
    let words: Vec<_> = call.split_ascii_whitespace().collect();
    let layer = |word: &str| match word.parse::<u64>() {
        Ok(number) => match u32::try_from(number) {
            Ok(layer) if layer < layers => Ok(layer),
            _ => Err(TemplateError::NoSuchMount(number)),
        },
        Err(_) => Err(TemplateError::Syntax(call.to_owned())),
    };
    let root = |layer| LayerPath {
        layer,
        path: String::new(),
    };
    Ok(match words[..] {
        ["mount", index] => Some(vec![root(layer(index)?)]),
        ["overlay", first, last] => {
            let (first, last) = (layer(first)?, layer(last)?);
            Some(match first > last {
                true => (last..=first).rev().map(root).collect(),
                false => (first..=last).map(root).collect(),
            })
        }
        _ => None,
    })
}

/// The path after a mount, such as `/upper`, without the leading slash.
fn parse_suffix(suffix: &str) -> Result<String, TemplateError> {
    let Some(path) = suffix.strip_prefix('/') else {
        return match suffix {
            "" => Ok(String::new()),
            _ => Err(TemplateError::Path(suffix.to_owned())),
        };
    };
    // A comma or a backslash would end or escape the path in the options of an overlay.
    let is_plain = !path.contains([',', '\\', '\0']);
    match is_plain
        && Path::new(path)
            .components()
            .all(|part| matches!(part, Component::Normal(_)))
    {
        true => Ok(path.to_owned()),
        false => Err(TemplateError::Path(suffix.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(layer: u32, path: &str) -> LayerPath {
        LayerPath {
            layer,
            path: path.to_owned(),
        }
    }

    #[test]
    fn templates_of_the_snapshotter_name_paths_in_layers() {
        for (text, expected) in [
            ("{{ mount 0 }}/upper", vec![path(0, "upper")]),
            ("{{mount 4}}", vec![path(4, "")]),
            ("{{ mount 0 }}/a/b/", vec![path(0, "a/b/")]),
            ("{{ overlay 1 3 }}", vec![path(1, ""), path(2, ""), path(3, "")]),
            ("{{ overlay 3 1 }}", vec![path(3, ""), path(2, ""), path(1, "")]),
            (
                "{{ mount 1 }}/x:{{ overlay 2 3 }}:{{ mount 4 }}",
                vec![path(1, "x"), path(2, ""), path(3, ""), path(4, "")],
            ),
        ] {
            assert_eq!(parse_paths(text, 5).unwrap(), expected, "{text}");
        }
        assert_eq!(parse_path("{{ mount 1 }}/work", 5).unwrap(), path(1, "work"));
    }

    #[test]
    fn other_text_is_refused_with_the_reason() {
        let syntax = |text: &str| TemplateError::Syntax(text.to_owned());
        for (text, expected) in [
            ("", syntax("")),
            ("{{ mount 0", syntax("{{ mount 0")),
            ("{{ mount 0 }}:", syntax("{{ mount 0 }}:")),
            ("{{ source 0 }}", syntax("{{ source 0 }}")),
            ("{{ mount }}", syntax("{{ mount }}")),
            ("{{ mount -1 }}", syntax(" mount -1 ")),
            ("{{ mount x }}", syntax(" mount x ")),
            ("/a{{ mount 0 }}", syntax("/a{{ mount 0 }}")),
            ("{{ mount 5 }}", TemplateError::NoSuchMount(5)),
            ("{{ mount 4294967296 }}", TemplateError::NoSuchMount(1 << 32)),
            ("{{ overlay 0 9 }}", TemplateError::NoSuchMount(9)),
            ("/s/1/fs", TemplateError::HostPath("/s/1/fs".to_owned())),
            ("{{ mount 0 }}:/s/fs", TemplateError::HostPath("/s/fs".to_owned())),
            ("{{ mount 0 }}upper", TemplateError::Path("upper".to_owned())),
            ("{{ mount 0 }}/../x", TemplateError::Path("/../x".to_owned())),
            ("{{ mount 0 }}/x,y", TemplateError::Path("/x,y".to_owned())),
            ("{{ mount 0 }}//x", TemplateError::Path("//x".to_owned())),
            (
                "{{ mount 0 }}{{ mount 1 }}",
                TemplateError::Path("{{ mount 1 }}".to_owned()),
            ),
        ] {
            assert_eq!(parse_paths(text, 5).unwrap_err(), expected, "{text}");
        }
        let several = "{{ overlay 0 1 }}";
        assert_eq!(parse_path(several, 5).unwrap_err(), syntax(several));
    }
}
