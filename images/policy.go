package images

import (
	"fmt"

	"sekisho/attest/seal"
	"sekisho/images/uki"
)

// maxPolicy bounds the file with a release's signed policies, in bytes.
const maxPolicy = 64 << 10

// Policy puts the signed policies in the file policy (attestctl seal sign) into
// the host image in the file from, and signs it anew for Secure Boot. What the
// policies cover is the same before and after. Policies of another image, or
// of other Secure Boot keys, are refused: nothing would ever open by them.
func (b *Builder) Policy(from, policy string) ([]File, error) {
	image, err := readCapped(from, uki.MaxImage)
	if err != nil {
		return nil, fmt.Errorf("host image: %w; build it with: mkimage host", err)
	}
	parts, err := uki.Split(image)
	if err != nil {
		return nil, fmt.Errorf("host image: %s: %w", from, err)
	}
	data, err := readCapped(policy, maxPolicy)
	if err != nil {
		return nil, fmt.Errorf("signed policies: %w", err)
	}
	release, _, err := seal.ReadRelease(data)
	if err != nil {
		return nil, fmt.Errorf("signed policies: %s: %w", policy, err)
	}
	boot, err := b.Predict(from)
	if err != nil {
		return nil, err
	}
	for _, pcr := range seal.PCRs {
		if boot.PCRs[pcr] != release.PCRs[pcr] {
			return nil, fmt.Errorf("signed policies: PCR %d of %s is %.16s…, they are for %.16s…: sign the reference values of this very image", pcr, from, boot.PCRs[pcr], release.PCRs[pcr])
		}
	}
	parts.Policy = data
	return b.finishHost(parts, release.Image, release.Version, nil)
}
