// node-store-clean makes containerd's persistent folder fit for the next cluster while containerd is stopped:
// images stay, and what pods of an earlier cluster left (containers, sandboxes, leases) goes. Of each of the
// lab's own repositories only the newest tags stay, for every build of an image makes a new one.
//
//	node-store-clean CONTAINERD_ROOT REGISTRY
//
// With the records gone, containerd's garbage collector, which runs right after the start, removes the
// snapshots and the content.
package main

import (
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"

	bolt "go.etcd.io/bbolt"
)

// The layout of containerd's metadata: v1 / NAMESPACE / kind (core/metadata/buckets.go of containerd).
var (
	schema = []byte("v1")
	images = []byte("images")
	kinds  = [][]byte{[]byte("containers"), []byte("sandboxes"), []byte("leases")}
)

// folders of plugins that describe pods, below containerd's root.
var folders = []string{
	"io.containerd.grpc.v1.cri",
	"io.containerd.runtime.v2.task",
	"io.containerd.sandbox.controller.v1.shim",
	"io.containerd.sandbox.controller.v1.podsandbox",
}

// keptTags is how many images of one repository stay: the one in use and the one before.
const keptTags = 2

type image struct {
	name    string
	digest  string
	updated time.Time
}

// readImages returns the image records of one namespace.
func readImages(bucket *bolt.Bucket) ([]image, error) {
	var found []image
	err := bucket.ForEachBucket(func(name []byte) error {
		record := bucket.Bucket(name)
		read := image{name: string(name)}
		if err := read.updated.UnmarshalBinary(record.Get([]byte("updatedat"))); err != nil {
			return fmt.Errorf("image %s: %w", name, err)
		}
		if target := record.Bucket([]byte("target")); target != nil {
			read.digest = string(target.Get([]byte("digest")))
		}
		found = append(found, read)
		return nil
	})
	return found, err
}

// outdated returns the names of the records that go: tags of the registry's repositories beyond the newest
// ones, with what else (names by digest) points to the same content.
func outdated(all []image, registry string) []string {
	repositories := map[string][]image{}
	for _, item := range all {
		colon := strings.LastIndex(item.name, ":")
		if strings.HasPrefix(item.name, registry+"/") && !strings.Contains(item.name, "@") && colon > 0 {
			repository := item.name[:colon]
			repositories[repository] = append(repositories[repository], item)
		}
	}
	dropped, kept := map[string]bool{}, map[string]bool{}
	for _, tags := range repositories {
		sort.Slice(tags, func(a, b int) bool { return tags[a].updated.After(tags[b].updated) })
		for index, tag := range tags {
			if index < keptTags {
				kept[tag.digest] = true
			} else {
				dropped[tag.digest] = true
			}
		}
	}
	var names []string
	for _, item := range all {
		if dropped[item.digest] && !kept[item.digest] {
			names = append(names, item.name)
		}
	}
	return names
}

func cleanImages(bucket *bolt.Bucket, registry string) (int, error) {
	if bucket == nil {
		return 0, nil
	}
	all, err := readImages(bucket)
	if err != nil {
		return 0, err
	}
	names := outdated(all, registry)
	for _, name := range names {
		if err := bucket.DeleteBucket([]byte(name)); err != nil {
			return 0, fmt.Errorf("image %s: %w", name, err)
		}
	}
	return len(names), nil
}

func clean(root, registry string) (int, error) {
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
			gone, err := cleanImages(top.Bucket(namespace).Bucket(images), registry)
			removed += gone
			return err
		})
	})
	return removed, err
}

func main() {
	if len(os.Args) != 3 {
		log.Fatalf("usage: %s CONTAINERD_ROOT REGISTRY", os.Args[0])
	}
	removed, err := clean(os.Args[1], os.Args[2])
	if err != nil {
		log.Fatal(err)
	}
	for _, folder := range folders {
		if err := os.RemoveAll(filepath.Join(os.Args[1], folder)); err != nil {
			log.Fatal(err)
		}
	}
	log.Printf("%s: removed %d records of earlier pods and images", os.Args[1], removed)
}
