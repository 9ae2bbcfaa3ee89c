# SPDX-License-Identifier: GPL-2.0
"""Container images that tests make."""

import gzip
import hashlib
import json
import os

LAYER = "application/vnd.oci.image.layer.v1.tar"


class Layout:
    """An OCI image layout with one image, whose layers are these tars."""

    def __init__(self, root, tars, command=("/bin/true",), env=()):
        self.root = root
        os.makedirs(f"{root}/blobs/sha256")
        layers, ids = [], []
        for nth, name in enumerate(tars):
            with open(name, "rb") as file:
                content = file.read()
            ids.append(f"sha256:{hashlib.sha256(content).hexdigest()}")
            # Each second one is compressed.
            packed = nth % 2
            layers.append(self.blob(gzip.compress(content, 1, mtime=0) if packed else content,
                                    LAYER + ("+gzip" if packed else "")))
        config = {"architecture": "amd64", "os": "linux", "config": {"Cmd": list(command), "Env": list(env)},
                  "rootfs": {"type": "layers", "diff_ids": ids}}
        config = self.blob(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json")
        manifest = {"schemaVersion": 2, "config": config, "layers": layers}
        manifest = self.blob(json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json")
        manifest["annotations"] = {"org.opencontainers.image.ref.name": "latest"}
        self.write("index.json", json.dumps({"schemaVersion": 2, "manifests": [manifest]}).encode())
        self.write("oci-layout", b'{"imageLayoutVersion": "1.0.0"}')

    def write(self, name, content):
        with open(f"{self.root}/{name}", "wb") as file:
            file.write(content)

    def blob(self, content, kind):
        digest = hashlib.sha256(content).hexdigest()
        self.write(f"blobs/sha256/{digest}", content)
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(content)}
