// node-store-clean makes containerd's persistent folder fit for the next cluster while containerd is stopped:
// images stay, and what pods of an earlier cluster left (containers, sandboxes, leases) goes.
//
//	node-store-clean CONTAINERD_ROOT
//
// With the records gone, containerd's garbage collector, which runs right after the start, removes the
// containers' snapshots.
package main

import (
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"time"

	bolt "go.etcd.io/bbolt"
)

// The layout of containerd's metadata: v1 / NAMESPACE / kind (core/metadata/buckets.go of containerd).
var (
	schema = []byte("v1")
	kinds  = [][]byte{[]byte("containers"), []byte("sandboxes"), []byte("leases")}
)

// folders of plugins that describe pods, below containerd's root.
var folders = []string{
	"io.containerd.grpc.v1.cri",
	"io.containerd.runtime.v2.task",
	"io.containerd.sandbox.controller.v1.shim",
	"io.containerd.sandbox.controller.v1.podsandbox",
}

func clean(root string) (int, error) {
	path := filepath.Join(root, "io.containerd.metadata.v1.bolt", "meta.db")
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	database, err := bolt.Open(path, 0o644, &bolt.Options{Timeout: 5 * time.Second})
	if err != nil {
		return 0, fmt.Errorf("open %s (does a containerd still run on it?): %w", path, err)
	}
	defer database.Close()
	removed := 0
	err = database.Update(func(tx *bolt.Tx) error {
		top := tx.Bucket(schema)
		if top == nil {
			return nil
		}
		return top.ForEachBucket(func(namespace []byte) error {
			for _, kind := range kinds {
				bucket := top.Bucket(namespace).Bucket(kind)
				if bucket == nil {
					continue
				}
				removed += len(bucket.Inspect().Children)
				if err := top.Bucket(namespace).DeleteBucket(kind); err != nil {
					return fmt.Errorf("%s/%s: %w", namespace, kind, err)
				}
			}
			return nil
		})
	})
	return removed, err
}

func main() {
	if len(os.Args) != 2 {
		log.Fatalf("usage: %s CONTAINERD_ROOT", os.Args[0])
	}
	removed, err := clean(os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	for _, folder := range folders {
		if err := os.RemoveAll(filepath.Join(os.Args[1], folder)); err != nil {
			log.Fatal(err)
		}
	}
	log.Printf("%s: removed %d records of earlier pods", os.Args[1], removed)
}
