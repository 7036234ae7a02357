package lab

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"sekisho/images"
)

// policy.go lets the lab's organisation decide as a real one must: reference
// values count only in a policy that two of its three policy keys have signed.
// In a real organisation the private halves never come near the verifier.

// policySigners are the organisation's policy keys, of which policyThreshold
// must sign.
var policySigners = [...]string{"policy-a", "policy-b", "policy-c"}

const policyThreshold = 2

// policyKeys makes the policy keys on first use and returns the files of their
// public halves.
func (l *Lab) policyKeys() (public []string, err error) {
	for _, name := range policySigners {
		text, err := l.publicKey(name)
		if err != nil {
			return nil, err
		}
		file := l.lab("pki", name+".pub")
		if err := writeFile(file, []byte(text), 0o644); err != nil {
			return nil, err
		}
		public = append(public, file)
	}
	return public, nil
}

// PublishRelease offers the image in the directory dir to the laptop, signed by
// as many keys as the policy; the policy in force has to accept it.
func (l *Lab) PublishRelease(ctx context.Context, dir string) error {
	image, manifest := filepath.Join(dir, images.HostImage), l.lab("site", "manifest.json")
	signed := l.lab("site", "manifest.cose")
	for _, args := range [][]string{
		{"release", "create", manifest, "-organization", labOrganization, "-image", image, "-references", filepath.Join(dir, images.HostReference), "-release", filepath.Join(dir, "release.json")},
		{"release", "sign", manifest, "-key", l.lab("pki", policySigners[0]+".key"), "-out", signed},
		{"release", "sign", signed, "-key", l.lab("pki", policySigners[2]+".key")},
		{"release", "publish", signed, "-image", image},
	} {
		if _, err := l.attestctl(ctx, nil, args...); err != nil {
			return err
		}
	}
	return nil
}

// signPolicy has the first signers sign a first policy that accepts the image
// with these reference values, and returns its file.
func (l *Lab) signPolicy(ctx context.Context, reference string) (string, error) {
	draft, signed := l.lab("site", "policy.json"), l.lab("site", "policy.cose")
	if _, err := l.attestctl(ctx, nil, "policy", "draft", draft, "-organization", labOrganization, "-references", reference); err != nil {
		return "", err
	}
	if err := os.RemoveAll(signed); err != nil {
		return "", fmt.Errorf("lab: %w", err)
	}
	from := draft
	for _, name := range policySigners[:policyThreshold] {
		if _, err := l.attestctl(ctx, nil, "policy", "sign", from, "-key", l.lab("pki", name+".key"), "-out", signed); err != nil {
			return "", err
		}
		from = signed
	}
	return signed, nil
}

// publishPolicy brings the policy for our image into force, checked first as an
// administrator would.
func (l *Lab) publishPolicy(ctx context.Context, b Boot) error {
	public, err := l.policyKeys()
	if err != nil {
		return err
	}
	signed, err := l.signPolicy(ctx, strings.Join(append([]string{l.out(images.HostReference)}, b.Accept...), ","))
	if err != nil {
		return err
	}
	for _, args := range [][]string{
		{"policy", "verify", signed, "-keys", strings.Join(public, ","), "-threshold", fmt.Sprint(policyThreshold)},
		{"policy", "publish", signed},
	} {
		if _, err := l.attestctl(ctx, nil, args...); err != nil {
			return err
		}
	}
	return nil
}
