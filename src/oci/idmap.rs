//! Mappings of user and group ids, of user namespaces and of mounts (OCI spec, "User namespace mappings" and "Mounts";
//! containerd's options `uidmap=` and `gidmap=` of overlay mounts).

use std::fmt;

use oci_spec::runtime::LinuxIdMapping;

/// A mapping from ids in a container or a file system to ids of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct IdMap {
    pub(crate) uids: Ranges,
    pub(crate) gids: Ranges,
}

/// At least one range. Displayed in the format of `/proc/<pid>/uid_map`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ranges(Vec<Range>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    container: u32,
    host: u32,
    size: u32,
}

impl IdMap {
    /// Parses the mapping of a spec. `None` if both lists are empty or missing.
    ///
    /// # Errors
    ///
    /// The reason, if only one list is empty, or a range is empty or exceeds 32 bits.
    pub(crate) fn from_spec(
        uids: Option<&[LinuxIdMapping]>,
        gids: Option<&[LinuxIdMapping]>,
    ) -> Result<Option<Self>, String> {
        let ranges = |mappings: Option<&[LinuxIdMapping]>| {
            Ranges::new(mappings.unwrap_or_default().iter().map(|mapping| Range {
                container: mapping.container_id(),
                host: mapping.host_id(),
                size: mapping.size(),
            }))
        };
        Self::combine(ranges(uids)?, ranges(gids)?)
    }

    /// Parses the mapping in the options of a snapshotter's mount: `uidmap=0:100000:65536` and `gidmap=…`, with commas
    /// between ranges. `None` if there are no such options.
    ///
    /// # Errors
    ///
    /// The reason why the options are invalid.
    pub(crate) fn from_options(options: &[String]) -> Result<Option<Self>, String> {
        let ranges = |key: &str| {
            let text = options.iter().find_map(|option| option.strip_prefix(key));
            let parsed: Result<Vec<_>, _> = text
                .into_iter()
                .flat_map(|text| text.split(','))
                .map(parse_range)
                .collect();
            Ranges::new(parsed?.into_iter())
        };
        Self::combine(ranges("uidmap=")?, ranges("gidmap=")?)
    }

    fn combine(uids: Option<Ranges>, gids: Option<Ranges>) -> Result<Option<Self>, String> {
        match (uids, gids) {
            (None, None) => Ok(None),
            (Some(uids), Some(gids)) => Ok(Some(Self { uids, gids })),
            (Some(_), None) | (None, Some(_)) => Err("uids and gids must both be mapped".to_owned()),
        }
    }
}

impl Ranges {
    /// Whether the id of the container is mapped.
    pub(crate) fn covers(&self, id: u32) -> bool {
        self.0.iter().any(|range| {
            id.checked_sub(range.container)
                .is_some_and(|offset| offset < range.size)
        })
    }

    fn new(ranges: impl Iterator<Item = Range>) -> Result<Option<Self>, String> {
        let ranges: Vec<_> = ranges.collect();
        for range in &ranges {
            let fits = |first: u32| first.checked_add(range.size).is_some();
            if range.size == 0 || !fits(range.container) || !fits(range.host) {
                return Err(format!("{range} is not a valid range of ids"));
            }
        }
        Ok((!ranges.is_empty()).then_some(Self(ranges)))
    }

    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }
}

/// Parses `container:host:size`.
fn parse_range(text: &str) -> Result<Range, String> {
    let numbers: Result<Vec<u32>, _> = text.split(':').map(str::parse).collect();
    match numbers.as_deref() {
        Ok(&[container, host, size]) => Ok(Range { container, host, size }),
        _ => Err(format!(
            "{text:?} is not a valid range of ids: write container:host:size"
        )),
    }
}

impl fmt::Display for Range {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {} {}", self.container, self.host, self.size)
    }
}

impl fmt::Display for Ranges {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|range| writeln!(formatter, "{range}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(text: &[&str]) -> Vec<String> {
        text.iter().map(|&option| option.to_owned()).collect()
    }

    #[test]
    fn options_of_a_mount_are_parsed() {
        let map = IdMap::from_options(&options(&["ro", "uidmap=0:1000:10,10:5000:1", "gidmap=0:7:1"]));
        let map = map.unwrap().unwrap();
        assert_eq!(map.uids.to_string(), "0 1000 10\n10 5000 1\n");
        assert_eq!((map.gids.to_string(), map.uids.count()), ("0 7 1\n".to_owned(), 2));
        assert_eq!(IdMap::from_options(&options(&["lowerdir=/a"])), Ok(None));
    }

    #[test]
    fn invalid_options_are_errors() {
        for text in [
            &["uidmap=0:1:1"][..],
            &["uidmap=0:1", "gidmap=0:1:1"],
            &["uidmap=0:1:1:1", "gidmap=0:1:1"],
            &["uidmap=a:1:1", "gidmap=0:1:1"],
            &["uidmap=0:1:0", "gidmap=0:1:1"],
            &["uidmap=0:4294967295:2", "gidmap=0:1:1"],
            &["uidmap=", "gidmap=0:1:1"],
        ] {
            assert!(IdMap::from_options(&options(text)).is_err(), "{text:?}");
        }
    }

    #[test]
    fn mapping_of_a_spec_needs_uids_and_gids() {
        let mapping: Vec<LinuxIdMapping> =
            serde_json::from_value(serde_json::json!([{"containerID": 0, "hostID": 9, "size": 2}])).unwrap();
        let map = IdMap::from_spec(Some(&mapping), Some(&mapping)).unwrap().unwrap();
        assert_eq!(map.uids.to_string(), "0 9 2\n");
        assert_eq!(IdMap::from_spec(None, Some(&[])), Ok(None));
        assert!(IdMap::from_spec(Some(&mapping), None).is_err());
    }

    #[test]
    fn ids_of_the_container_in_a_range_are_covered() {
        let map = IdMap::from_options(&options(&["uidmap=0:1000:10,20:5000:1", "gidmap=5:7:1"]));
        let map = map.unwrap().unwrap();
        let covered = |ids: &Ranges| (0..30).filter(|id| ids.covers(*id)).collect::<Vec<_>>();
        assert_eq!(covered(&map.uids), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 20]);
        assert_eq!(covered(&map.gids), [5]);
    }
}
