//! The data sources: the names of the files on a seed disk, and the defaults for those that the user leaves out.

use serde_json::json;

use super::{identity::Identity, image::Contents, keys::Keys};
use crate::oci::DataSource;

/// Network configuration of NoCloud in version 2, which is Netplan's: DHCP on each virtio interface. It matches by
/// driver and not by MAC address, because a guest keeps it, and the next pod that runs this guest has another address.
///
/// For Netplan, `eth0` is only an id. The other renderers of cloud-init configure the interface of that name, whatever
/// its driver (`cloudinit/net/network_state.py`, `handle_ethernets`).
const DEFAULT_NETWORK_CONFIG: &str =
    "version: 2\nethernets:\n  eth0:\n    match:\n      driver: virtio_net\n    dhcp4: true\n";

impl DataSource {
    /// Arranges the values of the keys in files with the names that guests look for. The user's values are not changed:
    /// metadata without an instance id or hostname stays without it.
    pub(super) fn arrange(self, keys: Keys, identity: &Identity) -> Contents {
        match self {
            Self::NoCloud => no_cloud(keys, identity),
            Self::ConfigDrive | Self::Ignition => config_drive(keys, identity),
        }
    }
}

/// cloud-init, `doc/rtd/reference/datasources/nocloud.rst`.
fn no_cloud(keys: Keys, identity: &Identity) -> Contents {
    let metadata = || {
        // A JSON string is also a YAML string.
        format!(
            "instance-id: {}\nlocal-hostname: {}\n",
            json!(identity.instance_id.as_str()),
            json!(identity.hostname.as_str())
        )
        .into_bytes()
    };
    let network_config = keys
        .network_config
        .unwrap_or_else(|| DEFAULT_NETWORK_CONFIG.as_bytes().to_vec());
    Contents {
        label: *b"CIDATA     ",
        folder: &[],
        files: present([
            ("user-data", Some(keys.user_data)),
            ("meta-data", Some(keys.meta_data.unwrap_or_else(metadata))),
            ("vendor-data", keys.vendor_data),
            ("network-config", Some(network_config)),
        ]),
    }
}

/// cloud-init, `doc/rtd/reference/datasources/configdrive.rst`, and `internal/providers/kubevirt` of Ignition. There is
/// no default for `network_data.json`: its links need MAC addresses.
fn config_drive(keys: Keys, identity: &Identity) -> Contents {
    let metadata = || {
        json!({
            "uuid": identity.instance_id.as_str(),
            "hostname": identity.hostname.as_str(),
        })
        .to_string()
        .into_bytes()
    };
    Contents {
        label: *b"config-2   ",
        folder: &["openstack", "latest"],
        files: present([
            ("user_data", Some(keys.user_data)),
            ("meta_data.json", Some(keys.meta_data.unwrap_or_else(metadata))),
            ("vendor_data.json", keys.vendor_data),
            ("network_data.json", keys.network_config),
        ]),
    }
}

fn present(files: [(&'static str, Option<Vec<u8>>); 4]) -> Vec<(String, Vec<u8>)> {
    let files = files.into_iter();
    files
        .filter_map(|(name, bytes)| bytes.map(|bytes| (name.to_owned(), bytes)))
        .collect()
}
