package fleet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.etcd.io/etcd/client/v3/concurrency"

	"sekisho/attest"
	"sekisho/attest/policy"
)

// Policies are the signed policies of the organisation: all published versions,
// and one that is evaluated and not enforced. It follows the store. It is safe
// for concurrent use.
type Policies struct {
	organization string
	ring         *policy.Keyring

	mu     sync.Mutex
	chain  policy.Chain
	newest *attest.PolicyID // that was published; nil: none
	shadow *policy.Signed
	hold   *Hold
}

func newPolicies(organization string, ring *policy.Keyring) *Policies {
	return &Policies{organization: organization, ring: ring}
}

// apply takes in one record of the store; value is nil if it was removed.
// Versions come in their order, and none is ever removed.
func (p *Policies) apply(key string, value []byte) error {
	if p == nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case key == "newest":
		p.newest = new(attest.PolicyID)
		return json.Unmarshal(value, p.newest)
	case key == "hold":
		if p.hold = nil; value == nil {
			return nil
		}
		p.hold = &Hold{} // also if it cannot be read
		return json.Unmarshal(value, p.hold)
	case key == "shadow":
		var err error
		if p.shadow = nil; value != nil {
			p.shadow, err = p.ring.Open(value)
		}
		return err
	case value == nil:
		return errors.New("a published policy was removed from the store: restore it from a backup")
	}
	s, err := p.ring.Open(value)
	if err != nil {
		return err
	}
	return p.chain.Append(p.organization, s)
}

// complete fails if the newest version that was published is not there:
// removing it must not bring an older one back.
func (p *Policies) complete() error {
	if p == nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	v := p.chain.Versions()
	if p.newest == nil || len(v) > 0 && v[len(v)-1].ID == *p.newest {
		return nil
	}
	return fmt.Errorf("policies: version %d was published and is not in the store: restore it from a backup", p.newest.Version)
}

// publish takes a signed policy in: as the next version or, if shadow is set,
// only to be evaluated. While a hold lasts nothing is published.
func (s *Service) publish(ctx context.Context, data []byte, shadow bool) (*policy.Signed, error) {
	p := s.Policies
	if p == nil {
		return nil, errors.New("no policy_keys in the verifier's configuration: nobody's policy is accepted")
	}
	b, err := p.ring.Open(data)
	if err != nil {
		return nil, err
	}
	if shadow {
		if b.Bundle.Organization != p.organization {
			return nil, fmt.Errorf("policy of %q, this verifier serves %q", b.Bundle.Organization, p.organization)
		}
		return b, s.change(ctx, func(t concurrency.STM) error {
			t.Put(s.keys.policy("shadow"), string(data))
			return nil
		})
	}
	p.mu.Lock()
	next, last := p.chain, p.newest
	err = next.Append(p.organization, b)
	p.mu.Unlock()
	if err != nil {
		return nil, err
	}
	return b, s.change(ctx, func(t concurrency.STM) error {
		h, held, err := read[Hold](t, s.keys.policy("hold"))
		if err != nil {
			return err
		}
		if held {
			return fmt.Errorf("held since %s because of a mass refusal; look into it, then attestctl policy release", h.Since.Format(time.RFC3339))
		}
		// Nobody else has published since we looked.
		newest, any, err := read[attest.PolicyID](t, s.keys.policy("newest"))
		if err != nil {
			return err
		}
		if any != (last != nil) || any && newest != *last {
			return fmt.Errorf("policy version %d was published at this very moment; look at it, then try again", newest.Version)
		}
		if old := t.Get(s.keys.policy("shadow")); old == string(data) {
			t.Del(s.keys.policy("shadow"))
		}
		t.Put(s.keys.policyVersion(b.Bundle.Version), string(data))
		return write(t, s.keys.policy("newest"), b.ID)
	})
}

// DropShadow ends the evaluation of the shadow.
func (s *Service) DropShadow(ctx context.Context) error { return s.drop(ctx, "shadow") }

// Release ends a hold, also one that could not be written.
func (s *Service) Release(ctx context.Context) error {
	if err := s.drop(ctx, "hold"); err != nil || s.Policies == nil {
		return err
	}
	s.Policies.mu.Lock()
	defer s.Policies.mu.Unlock()
	s.Policies.hold = nil
	return nil
}

func (s *Service) drop(ctx context.Context, what string) error {
	return s.change(ctx, func(t concurrency.STM) error {
		if t.Get(s.keys.policy(what)) != "" {
			t.Del(s.keys.policy(what))
		}
		return nil
	})
}

// Hold is a mass refusal that stopped the roll-out of policies.
type Hold struct {
	Since   time.Time             `json:"since"`
	Refused int                   `json:"refused"` // devices within a minute
	Devices int                   `json:"devices"` // enrolled
	Version uint64                `json:"version"` // of the policy in force, 0: none; no newer one comes into force
	Reasons map[attest.Reason]int `json:"reasons"` // devices by reason
}

// holdPolicies stops the roll-out. A hold that lasts already stays as it is.
func (s *Service) holdPolicies(ctx context.Context, h Hold) error {
	p := s.Policies
	if p == nil {
		return nil
	}
	p.mu.Lock()
	if p.hold == nil {
		if b := p.chain.InForce(h.Since, false, 0); b != nil {
			h.Version = b.Bundle.Version
		}
		p.hold = &h // even if it cannot be written
	}
	p.mu.Unlock()
	return s.change(ctx, func(t concurrency.STM) error {
		if t.Get(s.keys.policy("hold")) != "" {
			return nil
		}
		return write(t, s.keys.policy("hold"), h)
	})
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
