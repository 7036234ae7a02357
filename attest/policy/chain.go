package policy

import (
	"fmt"
	"time"

	"sekisho/attest"
)

// Chain is the published versions of one organisation's policy, oldest first.
// The zero value is the empty chain, of which nothing is in force.
type Chain struct {
	versions []*Signed
}

// Append adds the next version. It refuses gaps, forks, another organisation,
// and a version that would come into force before the one that it supersedes.
func (c *Chain) Append(organization string, s *Signed) error {
	b := s.Bundle
	if b.Organization != organization {
		return fmt.Errorf("policy of %q, this verifier serves %q", b.Organization, organization)
	}
	if len(c.versions) == 0 {
		c.versions = append(c.versions, s)
		return nil
	}
	last := c.versions[len(c.versions)-1]
	switch {
	case b.Version <= last.Bundle.Version:
		return fmt.Errorf("policy version %d is not newer than version %d, which is published", b.Version, last.Bundle.Version)
	case b.Supersedes != last.ID.Digest:
		return fmt.Errorf("policy version %d supersedes %s, the newest published is version %d, %s", b.Version, b.Supersedes, last.Bundle.Version, last.ID.Digest)
	case b.NotBefore < last.Bundle.NotBefore:
		return fmt.Errorf("policy version %d would be in force before version %d, which it supersedes", b.Version, last.Bundle.Version)
	}
	c.versions = append(c.versions, s)
	return nil
}

// InForce returns the newest version whose time has come, nil if there is
// none. While hold is set, versions newer than held stay pending.
func (c *Chain) InForce(now time.Time, hold bool, held uint64) *Signed {
	for i := len(c.versions) - 1; i >= 0; i-- {
		v := c.versions[i]
		if v.Bundle.NotBefore <= now.Unix() && (!hold || v.Bundle.Version <= held) {
			return v
		}
	}
	return nil
}

// Versions returns all versions, oldest first.
func (c *Chain) Versions() []*Signed { return append([]*Signed(nil), c.versions...) }

// Worst returns the status that findings leave of an affirming result.
func Worst(findings []attest.Finding) attest.Status {
	status := attest.StatusAffirming
	for _, f := range findings {
		switch f.Severity {
		case attest.SeverityWarn:
		case attest.SeverityDegrade:
			status = max(status, attest.StatusWarning)
		default:
			status = attest.StatusContraindicated
		}
	}
	return status
}
