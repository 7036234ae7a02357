package fleet

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"sekisho/attest"
	"sekisho/attest/policy"
)

// Policies are the signed policies of the organisation, in files of one
// directory: policy-VERSION.cose for each that was published, shadow.cose for
// one that is evaluated and not enforced. It is safe for concurrent use.
type Policies struct {
	dir, state   string
	organization string
	ring         *policy.Keyring

	mu     sync.Mutex
	chain  policy.Chain
	shadow *policy.Signed
	hold   *Hold
}

// newest is what the state file remembers, so that deleting policies cannot
// bring an older one back.
type newest struct {
	Policy *attest.PolicyID `json:"policy,omitempty"`
	Hold   *Hold            `json:"hold,omitempty"`
}

const (
	policyPattern = "policy-*.cose"
	shadowFile    = "shadow.cose"
)

// OpenPolicies reads the policies in dir, each of which ring must have signed.
// state is the file that remembers the newest and a hold.
func OpenPolicies(dir, state, organization string, ring *policy.Keyring) (*Policies, error) {
	p := &Policies{dir: dir, state: state, organization: organization, ring: ring}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("policies: %w", err)
	}
	names, err := filepath.Glob(filepath.Join(dir, policyPattern))
	if err != nil {
		return nil, fmt.Errorf("policies: %w", err)
	}
	slices.Sort(names) // versions have leading zeros
	for _, name := range names {
		s, err := p.open(name)
		if err != nil {
			return nil, fmt.Errorf("policies: %s: %w", name, err)
		}
		if err := p.chain.Append(organization, s); err != nil {
			return nil, fmt.Errorf("policies: %s: %w", name, err)
		}
	}
	if p.shadow, err = p.open(filepath.Join(dir, shadowFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("policies: %s: %w", shadowFile, err)
	}
	data, err := readFile(state)
	if errors.Is(err, os.ErrNotExist) {
		return p, nil
	}
	if err != nil {
		return nil, fmt.Errorf("policies: %w", err)
	}
	var n newest
	if err := json.Unmarshal(data, &n); err != nil {
		return nil, fmt.Errorf("policies: %s: %w", state, err)
	}
	p.hold = n.Hold
	if n.Policy == nil {
		return p, nil
	}
	for _, v := range p.chain.Versions() {
		if v.ID == *n.Policy {
			return p, nil
		}
	}
	return nil, fmt.Errorf("policies: version %d was published and is not in %s: bring its file back", n.Policy.Version, dir)
}

func (p *Policies) open(name string) (*policy.Signed, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, policy.MaxBundle+1))
	if err != nil {
		return nil, err
	}
	return p.ring.Open(data)
}

// Publish takes a signed policy in: as the next version or, if shadow is set,
// only to be evaluated. While a hold lasts nothing is published.
func (p *Policies) Publish(data []byte, shadow bool) (*policy.Signed, error) {
	if p == nil {
		return nil, errors.New("no policy_keys in the verifier's configuration: nobody's policy is accepted")
	}
	s, err := p.ring.Open(data)
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if shadow {
		if s.Bundle.Organization != p.organization {
			return nil, fmt.Errorf("policy of %q, this verifier serves %q", s.Bundle.Organization, p.organization)
		}
		if err := replace(filepath.Join(p.dir, shadowFile), data); err != nil {
			return nil, fmt.Errorf("policy: %w", err)
		}
		p.shadow = s
		return s, nil
	}
	if p.hold != nil {
		return nil, fmt.Errorf("held since %s because of a mass refusal; look into it, then attestctl policy release", p.hold.Since.Format(time.RFC3339))
	}
	next := p.chain
	if err := next.Append(p.organization, s); err != nil {
		return nil, err
	}
	if err := replace(filepath.Join(p.dir, fmt.Sprintf("policy-%020d.cose", s.Bundle.Version)), data); err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	if err := p.remember(newest{&s.ID, p.hold}); err != nil {
		return nil, err
	}
	p.chain = next
	if p.shadow != nil && p.shadow.ID == s.ID {
		return s, p.dropShadow()
	}
	return s, nil
}

// DropShadow ends the evaluation of the shadow.
func (p *Policies) DropShadow() error {
	if p == nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.dropShadow()
}

func (p *Policies) dropShadow() error {
	p.shadow = nil
	if err := os.Remove(filepath.Join(p.dir, shadowFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("policy: %w", err)
	}
	return nil
}

func (p *Policies) remember(n newest) error {
	data, err := json.Marshal(n)
	if err != nil {
		return fmt.Errorf("policy: %w", err)
	}
	if err := replace(p.state, data); err != nil {
		return fmt.Errorf("policy: %w", err)
	}
	return nil
}

func (p *Policies) newest() *attest.PolicyID {
	if v := p.chain.Versions(); len(v) > 0 {
		return &v[len(v)-1].ID
	}
	return nil
}

// Hold is a mass refusal that stopped the roll-out of policies.
type Hold struct {
	Since   time.Time             `json:"since"`
	Refused int                   `json:"refused"` // devices within a minute
	Devices int                   `json:"devices"` // enrolled
	Version uint64                `json:"version"` // of the policy in force, 0: none; no newer one comes into force
	Reasons map[attest.Reason]int `json:"reasons"` // devices by reason
}

// Hold stops the roll-out. A hold that lasts already stays as it is.
func (p *Policies) Hold(h Hold) error {
	if p == nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.hold != nil {
		return nil
	}
	if s := p.chain.InForce(h.Since, false, 0); s != nil {
		h.Version = s.Bundle.Version
	}
	p.hold = &h // even if it cannot be written
	return p.remember(newest{p.newest(), &h})
}

// Release ends a hold.
func (p *Policies) Release() error {
	if p == nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.remember(newest{p.newest(), nil}); err != nil {
		return err
	}
	p.hold = nil
	return nil
}

// InForce returns the policy in force and the shadow, either nil. needed: this
// verifier affirms nothing without a policy.
func (p *Policies) InForce(now time.Time) (enforced, shadow *policy.Signed, needed bool) {
	if p == nil {
		return nil, nil, false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	var version uint64
	if p.hold != nil {
		version = p.hold.Version
	}
	return p.chain.InForce(now, p.hold != nil, version), p.shadow, true
}

// PolicyInfo is one policy of the verifier.
type PolicyInfo struct {
	attest.PolicyID
	State      string          `json:"state"` // "in force", "pending", "superseded", "shadow"
	NotBefore  time.Time       `json:"not_before"`
	Rules      int             `json:"rules"`
	References []string        `json:"references"`
	Signers    []attest.Digest `json:"signers"`
}

// PolicyStatus is the state of all policies.
type PolicyStatus struct {
	Needed   bool         `json:"needed"` // policy_keys are configured
	Policies []PolicyInfo `json:"policies"`
	Hold     *Hold        `json:"hold,omitempty"`
}

// Status says what is in force.
func (p *Policies) Status(now time.Time) PolicyStatus {
	s := PolicyStatus{Policies: []PolicyInfo{}}
	if p == nil {
		return s
	}
	enforced, _, _ := p.InForce(now)
	p.mu.Lock()
	defer p.mu.Unlock()
	s.Needed, s.Hold = true, p.hold
	for _, v := range p.chain.Versions() {
		state := "superseded"
		switch {
		case v == enforced:
			state = "in force"
		case enforced == nil || v.Bundle.Version > enforced.Bundle.Version:
			state = "pending"
		}
		s.Policies = append(s.Policies, info(v, state))
	}
	if p.shadow != nil {
		s.Policies = append(s.Policies, info(p.shadow, "shadow"))
	}
	return s
}

func info(s *policy.Signed, state string) PolicyInfo {
	i := PolicyInfo{PolicyID: s.ID, State: state, NotBefore: time.Unix(s.Bundle.NotBefore, 0).UTC(), Rules: len(s.Bundle.Rules), Signers: s.Signers}
	for _, r := range s.Bundle.References {
		i.References = append(i.References, ReferenceID(r.Values))
	}
	return i
}
