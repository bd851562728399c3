# Writes OCI archives for `ctr image import`: archive NAME LAYER CONFIG. Sourced by the scripts that build images. Their
# folder for temporary files is $work.

# The same files always give the same archive.
deterministic=(--sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner)

# blob FILE: moves it into the image layout $layout; prints its digest and size.
blob() {
  local digest
  digest=$(sha256sum <"$1" | cut -d' ' -f1)
  mv "$1" "$layout/blobs/sha256/$digest"
  echo "$digest $(stat -c %s "$layout/blobs/sha256/$digest")"
}

# archive NAME LAYER CONFIG: writes NAME.tar, an image with one layer, the tar file LAYER, which stays uncompressed
# for fast imports. CONFIG is the JSON object with the image's process settings.
archive() {
  local name=$1 layer config digest size
  layout=$work/$name.layout
  mkdir -p "$layout/blobs/sha256"
  read -r digest size <<<"$(blob "$2")"
  layer='{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"sha256:'$digest'","size":'$size'}'
  printf '{"architecture":"amd64","os":"linux","config":%s,"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}' \
    "$3" "$digest" >"$work/json"
  read -r digest size <<<"$(blob "$work/json")"
  config='{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:'$digest'","size":'$size'}'
  printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":%s,"layers":[%s]}' \
    "$config" "$layer" >"$work/json"
  read -r digest size <<<"$(blob "$work/json")"
  printf '{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:%s","size":%s,"annotations":{"io.containerd.image.name":"localhost/%s:latest","org.opencontainers.image.ref.name":"latest"}}]}' \
    "$digest" "$size" "$name" >"$layout/index.json"
  echo '{"imageLayoutVersion":"1.0.0"}' >"$layout/oci-layout"
  tar -cf "$work/$name.tar" "${deterministic[@]}" -C "$layout" oci-layout index.json blobs
  rm -rf "$layout"
}
