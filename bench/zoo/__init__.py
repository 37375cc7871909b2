"""The models of the zoo, trained briefly: do they learn, and at what price?"""
