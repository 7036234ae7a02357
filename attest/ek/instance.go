package ek

import (
	"encoding/asn1"
	"strconv"
)

// Instance is the virtual machine whose TPM a certificate of Google's cloud is
// for, as its extension 1.3.6.1.4.1.11129.2.1.21 has it. What it says of the
// machine's security is left out: it is of the day when the certificate was
// made.
type Instance struct {
	Zone          string `json:"zone"`
	ProjectID     string `json:"projectId"`
	ProjectNumber string `json:"projectNumber"`
	ID            string `json:"instanceId"`
	Name          string `json:"instanceName"`
}

// instance reads the extension; nil if c has none, or a malformed one.
func (c *Certificate) instance() *Instance {
	id := asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 11129, 2, 1, 21}
	for _, e := range c.Extensions {
		if !e.Id.Equal(id) {
			continue
		}
		var v struct {
			Zone          string `asn1:"utf8"`
			ProjectNumber int64
			ProjectID     string `asn1:"utf8"`
			InstanceID    int64
			Name          string        `asn1:"utf8"`
			Security      asn1.RawValue `asn1:"optional,tag:0"`
		}
		if rest, err := asn1.Unmarshal(e.Value, &v); err != nil || len(rest) != 0 {
			return nil
		}
		return &Instance{v.Zone, v.ProjectID, strconv.FormatInt(v.ProjectNumber, 10), strconv.FormatInt(v.InstanceID, 10), v.Name}
	}
	return nil
}
