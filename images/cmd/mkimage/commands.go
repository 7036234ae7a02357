package main

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"maps"
	"slices"

	"sekisho/attest"
	"sekisho/images"
)

// usageError is a fault of the caller's, not of the build.
type usageError string

func (e usageError) Error() string { return string(e) }

// result is what a command prints.
type result interface{ print(io.Writer) error }

// command runs one command and returns what it made.
func (o *options) command(ctx context.Context, name string, files []string) (result, error) {
	if (name == "predict") != (len(files) == 1) {
		return nil, usageError(fmt.Sprintf("%s: %d files given; predict takes one, others none", name, len(files)))
	}
	if !images.ValidVersion(o.version) {
		return nil, usageError(fmt.Sprintf("version %q: want small letters, digits, dots and dashes", o.version))
	}
	switch name {
	case "keys":
		k, err := o.build.LoadKeys()
		if err != nil {
			return nil, err
		}
		sum := func(der []byte) attest.Digest { return sha256.Sum256(der) }
		return keys{o.build.Keys, sum(k.PK.Cert.Raw), sum(k.KEK.Cert.Raw), sum(k.DB.Cert.Raw)}, nil
	case "host":
		if o.tamper != "" {
			if !slices.Contains(images.Components(), images.Component(o.tamper)) {
				return nil, usageError(fmt.Sprintf("-tamper %q: want one of %v", o.tamper, images.Components()))
			}
			if o.build.Out == "out" {
				return nil, usageError("-tamper: name another directory with -out, or the host image would be replaced")
			}
			return written(o.build.Tamper(o.from, images.Component(o.tamper)))
		}
		if o.policy != "" {
			return written(o.build.Policy(o.from, o.policy))
		}
		if o.org == "" {
			return nil, usageError("host: name the organisation's file with -org FILE")
		}
		return written(o.build.Host(ctx, images.HostOptions{Organization: o.org, Version: o.version, Lab: o.lab, Refresh: o.refresh}))
	case "work":
		return written(o.build.Work(ctx, o.lab, o.refresh))
	case "disk":
		return written(o.build.Disk(o.work))
	case "predict":
		r, err := o.build.Predict(files[0])
		if err != nil {
			return nil, err
		}
		return prediction{r}, nil
	}
	return nil, usageError(fmt.Sprintf("unknown command %q", name))
}

// fileList is the result of a build.
type fileList struct {
	Files []images.File `json:"files"`
}

func written(f []images.File, err error) (result, error) { return fileList{f}, err }

func (l fileList) print(w io.Writer) error {
	for _, f := range l.Files {
		if _, err := fmt.Fprintf(w, "%9.1f MiB  %s\n", float64(f.Size)/(1<<20), f.Path); err != nil {
			return err
		}
	}
	return nil
}

// keys are the SHA-256 digests of the certificates.
type keys struct {
	Directory string        `json:"directory"`
	PK        attest.Digest `json:"pk"`
	KEK       attest.Digest `json:"kek"`
	DB        attest.Digest `json:"db"`
}

func (k keys) print(w io.Writer) error {
	_, err := fmt.Fprintf(w, "SHA-256 of the certificates in %s\nPK   %s\nKEK  %s\ndb   %s\n", k.Directory, k.PK, k.KEK, k.DB)
	return err
}

type prediction struct{ *attest.ReferenceValues }

func (p prediction) print(w io.Writer) error {
	for _, pcr := range slices.Sorted(maps.Keys(p.PCRs)) {
		if _, err := fmt.Fprintf(w, "PCR %-2d  %s\n", pcr, p.PCRs[pcr]); err != nil {
			return err
		}
	}
	for _, c := range p.Components {
		if _, err := fmt.Fprintf(w, "  %-2d  %-24s %s  %s\n", c.PCR, c.Name, c.Digest, c.Event); err != nil {
			return err
		}
	}
	return nil
}
