package report

import (
	"crypto/ecdsa"
	"fmt"
	"strconv"
	"strings"

	"sekisho/attest"
)

// policyURN begins the name of a policy in a result.
const policyURN = "urn:sekisho:policy:"

// Result returns the result that a report is of; key must have signed both.
// The evidence is not appraised again.
func Result(data []byte, key *ecdsa.PublicKey) (res attest.Result, err error) {
	r, _, err := Parse(data, key)
	if err != nil {
		return res, err
	}
	payload, _, err := open(r.Token, maxToken, earType, "", key)
	if err != nil {
		return res, fmt.Errorf("report: token: %w", err)
	}
	c, err := decodeAs[Claims](payload)
	if err != nil {
		return res, err
	}
	a, err := c.Appraisal()
	if err != nil {
		return res, fmt.Errorf("report: %w", err)
	}
	res = attest.Result{
		Profile: attest.ResultType, IssuedAt: c.IssuedAt, Verifier: c.Issuer, Status: a.Status, Device: attest.Digest(r.Device.ID), Nonce: c.Nonce,
		Reason: a.Reason, Detail: a.Detail, Findings: a.Findings, Image: a.Image, Events: a.Events, Shadow: a.Shadow, Changes: a.Changes,
		LastGood: a.LastGood, Firmware: a.Firmware, Report: a.Report,
	}
	for _, name := range a.Policies {
		p, err := parsePolicyURN(name)
		if err != nil {
			return res, err
		}
		res.Policy = &p
	}
	return res, nil
}

func parsePolicyURN(name string) (p attest.PolicyID, err error) {
	rest, ok := strings.CutPrefix(name, policyURN)
	parts := strings.Split(rest, "/")
	n := len(parts)
	if !ok || n < 3 {
		return p, fmt.Errorf("policy %.200q: not a name of ours", name)
	}
	p.Organization = strings.Join(parts[:n-2], "/")
	if p.Version, err = strconv.ParseUint(parts[n-2], 10, 64); err != nil {
		return p, fmt.Errorf("policy %.200q: %w", name, err)
	}
	return p, p.Digest.UnmarshalText([]byte(parts[n-1]))
}
