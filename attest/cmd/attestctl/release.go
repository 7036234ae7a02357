package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"sekisho/attest"
	"sekisho/attest/fleet"
	"sekisho/attest/release"
	"sekisho/attest/seal"
)

// releaseLife is how long a manifest is good unless -expires says otherwise.
const releaseLife = 90 * 24 * time.Hour

// releaseOptions are the flags of the commands about releases.
type releaseOptions struct {
	image, minimumFrom string
	percent            int
}

func (o *releaseOptions) flags(f *flag.FlagSet) {
	f.StringVar(&o.image, "image", "", "signed image of the host domain, `file`")
	f.StringVar(&o.minimumFrom, "minimum-from", "", "oldest `version` that may go to this one directly")
	f.IntVar(&o.percent, "percent", 100, "to how many of a hundred laptops a release is offered")
}

func releaseCommands() map[string]command {
	return map[string]command{
		"release create":  {1, releaseCreate, show(printManifest)},
		"release sign":    {1, releaseSign, show(printManifest)},
		"release show":    {1, releaseShow, show(printManifest)},
		"release publish": {1, releasePublish, show(printReleaseInfo)},
		"release percent": {1, releasePercent, show(printReleaseInfo)},
		"release list":    {0, releaseList, show(printReleases)},
	}
}

// digestFile returns SHA-256 and size of an image.
func digestFile(name string) (d attest.Digest, size int64, err error) {
	f, err := os.Open(name)
	if err != nil {
		return d, 0, err
	}
	defer f.Close()
	h := sha256.New()
	size, err = io.Copy(h, io.LimitReader(f, release.MaxImage+1))
	if err == nil && size > release.MaxImage {
		err = fmt.Errorf("%s: over %d bytes", name, int64(release.MaxImage))
	}
	return attest.Digest(h.Sum(nil)), size, err
}

// releaseCreate writes the manifest of an image from its reference values and
// its signed policies, which must be of one and the same release.
func releaseCreate(_ context.Context, o *options, args []string) (any, error) {
	if o.update.image == "" || o.policy.references == "" || o.card.release == "" || o.policy.organization == "" {
		return nil, errUsage
	}
	data, err := readFile(o.policy.references)
	if err != nil {
		return nil, err
	}
	refs, err := attest.ParseReferenceValues(data)
	if err != nil {
		return nil, err
	}
	if data, err = readFile(o.card.release); err != nil {
		return nil, err
	}
	sealed, _, err := seal.ReadRelease(data)
	if err != nil {
		return nil, err
	}
	if sealed.Version != refs.Version || sealed.PCRs[7] != refs.PCRs[7] || sealed.PCRs[11] != refs.PCRs[11] {
		return nil, fmt.Errorf("%s is of another image than %s", o.card.release, o.policy.references)
	}
	m := &release.Manifest{Profile: release.Profile, Organization: o.policy.organization, Image: refs.Image, Version: refs.Version,
		Epoch: sealed.Epoch, PCRs: refs.PCRs, MinimumFrom: o.update.minimumFrom}
	life := o.expires
	if life == 0 {
		life = releaseLife
	}
	m.Expires = time.Now().Add(life).Unix()
	if m.SHA256, m.Size, err = digestFile(o.update.image); err != nil {
		return nil, err
	}
	if err := m.Validate(); err != nil {
		return nil, err
	}
	if data, err = json.MarshalIndent(m, "", "  "); err != nil {
		return nil, err
	}
	return m, os.WriteFile(args[0], append(data, '\n'), 0o644)
}

func releaseSign(_ context.Context, o *options, args []string) (any, error) {
	key, err := o.privateKey()
	if err != nil {
		return nil, err
	}
	data, err := readAtMost(args[0], release.MaxManifest)
	if err != nil {
		return nil, err
	}
	out, old := o.policy.out, data
	var m *release.Manifest
	if bytes.HasPrefix(bytes.TrimSpace(data), []byte("{")) {
		if m, err = release.Parse(data); err != nil {
			return nil, err
		}
		old = nil
		if out == "" {
			out = strings.TrimSuffix(args[0], ".json") + ".cose"
		}
	} else if out == "" {
		out = args[0]
	}
	signed, err := release.Sign(m, old, key)
	if err != nil {
		return nil, err
	}
	if m, err = release.Read(signed); err != nil {
		return nil, err
	}
	return m, os.WriteFile(out, signed, 0o644)
}

func releaseShow(_ context.Context, _ *options, args []string) (any, error) {
	data, err := readAtMost(args[0], release.MaxManifest)
	if err != nil {
		return nil, err
	}
	return release.Read(data)
}

func releasePublish(ctx context.Context, o *options, args []string) (any, error) {
	data, err := readAtMost(args[0], release.MaxManifest)
	if err != nil {
		return nil, err
	}
	m, err := release.Read(data)
	if err != nil {
		return nil, err
	}
	if o.update.image == "" {
		return nil, errUsage
	}
	d, _, err := digestFile(o.update.image)
	if err != nil {
		return nil, err
	}
	if d != m.SHA256 {
		return nil, fmt.Errorf("%s is not the image of release %s", o.update.image, m.Version)
	}
	f, err := os.Open(o.update.image)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := o.admin().PutImage(ctx, d, f); err != nil {
		return nil, err
	}
	return o.admin().PublishRelease(ctx, data, o.update.percent)
}

func releasePercent(ctx context.Context, o *options, args []string) (any, error) {
	return o.admin().RollOut(ctx, args[0], o.update.percent)
}

func releaseList(ctx context.Context, o *options, _ []string) (any, error) {
	return o.admin().Releases(ctx)
}

func printManifest(w printer, m *release.Manifest) error {
	t, flush := w.table("", "")
	t.say("リリース\t%s %s（%s）、エポック %d\nイメージ\t%s、%d バイト\n期限\t%s", "release\t%s %s of %s, epoch %d\nimage\t%s, %d bytes\nexpires\t%s",
		m.Image, m.Version, m.Organization, m.Epoch, m.SHA256, m.Size, w.when(time.Unix(m.Expires, 0)))
	if m.MinimumFrom != "" {
		t.say("対象\t%s 以降", "from\t%s or newer", m.MinimumFrom)
	}
	return flush()
}

func printReleaseInfo(w printer, i fleet.ReleaseInfo) error {
	return printReleases(w, []fleet.ReleaseInfo{i})
}

func printReleases(w printer, list []fleet.ReleaseInfo) error {
	t, flush := w.table("版\tエポック\t配布先\t期限\t保有\tイメージ", "VERSION\tEPOCH\tDEVICES\tEXPIRES\tHERE\tIMAGE")
	for _, i := range list {
		t.row(i.Version, i.Epoch, fmt.Sprintf("%d %%", i.Percent), t.when(i.Expires), i.Here, i.SHA256)
	}
	return flush()
}
